"""The command that continues a text."""

from __future__ import annotations

from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, SeedOption, app, out


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and continuation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of the continuation.")] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Continuations to write.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(help="Above 1 flattens probabilities, below sharpens; 0 takes the likeliest."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many likeliest tokens; 0 among all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens that together have this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample among tokens with this share of the likeliest one's probability.")
    ] = None,
    top_a: Annotated[
        float | None,
        typer.Option(help="Sample among tokens with this times the square of the likeliest one's probability."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, makes tokens that were there already less likely.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A folder of an adapter: PEFT's, or a LoRA run's.")] = None,
    do_sample: Annotated[bool | None, typer.Option(help="Sample; by itself where several are asked for.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Continue a text.

    Example: plait generate gpt2 "Hello, how are you?" --max-length 50 --num-return-sequences 5
    """
    made = plait.load(model, device, precision, adapter=adapter).generate(
        prompt, max_length=max_length, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences,
        do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, top_a=top_a,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    texts = made if isinstance(made, list) else [made]
    for text in texts:
        out.print(text, markup=False)
        if len(texts) > 1:
            out.print("---")
