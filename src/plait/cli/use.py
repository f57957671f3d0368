"""Commands that use a model: generate, classify, describe, transcribe, draw, speak, embed, export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.console import (
    DeviceOption,
    ModelArgument,
    PrecisionOption,
    SeedOption,
    app,
    existing,
    media_or_text,
    note_windows,
    out,
    plain,
    write,
)

if TYPE_CHECKING:
    from plait.hf.pretrained import Pretrained
    from plait.inference.model import Model


def load(name: str, device: str, precision: str = "auto") -> Model | Pretrained:
    """`plait.load`, imported when it is needed: torch takes seconds."""
    from plait.inference.model import load

    return load(name, device, precision)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and continuation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of the continuation.")] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1)] = 1,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    do_sample: Annotated[bool | None, typer.Option(help="Sample; by itself where several are asked for.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Continue a text.

    Example: plait generate gpt2 "Hello, how are you?" --max-length 50 --num-return-sequences 5
    """
    made = load(model, device, precision).generate(
        prompt, max_length=max_length, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences,
        do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    texts = made if isinstance(made, list) else [made]
    for text in texts:
        out.print(text, markup=False)
        if len(texts) > 1:
            out.print("---")


@app.command()
def classify(
    model: ModelArgument,
    files: Annotated[list[str], typer.Argument(help="Images or recordings, or texts.")],
    labels: Annotated[str | None, typer.Option(help="Choose between these, with commas.")] = None,
    column: Annotated[str | None, typer.Option(help="Answer in this text column.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Answers to show.")] = 3,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Name what is in an image or a recording, with probabilities.

    Example: plait classify runs/demo runs/demo/files/images/0003.png
    """
    loaded = load(model, device, precision)
    wanted = [label.strip() for label in labels.split(",")] if labels else None
    for file in files:
        value = media_or_text(file)
        note_windows(loaded, value)
        ranked = loaded.classify(value, labels=wanted, column=column, top=top)
        out.print(plain(f"{file}: " + ", ".join(f"{label} {probability:.3f}" for label, probability in ranked)))


@app.command()
def describe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Images.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Say in words what is in an image.

    Example: plait describe runs/demo runs/demo/files/images/0003.png --column zh
    """
    loaded = load(model, device, precision)
    for file in files:
        out.print(plain(f"{file}: {loaded.describe(existing(file), column=column)}"))


@app.command()
def transcribe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Recordings.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Write down what is said in a recording.

    Example: plait transcribe openai/whisper-tiny speech.wav
    """
    loaded = load(model, device, precision)
    for file in files:
        note_windows(loaded, existing(file))
        out.print(plain(f"{file}: {loaded.transcribe(existing(file), column=column)}"))


@app.command()
def draw(
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(help="What to draw; each text gets a row.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each; more than one make a contact sheet.")] = 1,
    best_of: Annotated[int | None, typer.Option(help="Draw so many for each, keep those nearest to the text.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly the text rules; 1 is not at all more.")] = None,
    seed: SeedOption = 0,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="A PNG file.")] = Path("drawing.png"),
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Draw images of texts.

    Example: plait draw runs/demo "three" -n 16 -o threes.png
    """
    from plait.search.contact_sheet import contact_sheet

    loaded = load(model, device, precision)
    images = [p for text in texts for p in loaded.draw(text, n=n, best_of=best_of, guidance=guidance, seed=seed)]
    write(out_file, contact_sheet(images, n if len(texts) > 1 else None))
    out.print(f"{len(images)} drawn: {out_file}")


@app.command()
def speak(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="What to say.")],
    guidance: Annotated[float | None, typer.Option(help="How strongly the text rules; 1 is not at all more.")] = None,
    seed: SeedOption = 0,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="A WAV file.")] = Path("speech.wav"),
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Say a text.

    Example: plait speak runs/demo "seven" -o seven.wav
    """
    from plait.modalities.audio_files import encode_wav

    wave, rate = load(model, device, precision).speak(text, n=1, guidance=guidance, seed=seed)[0]
    write(out_file, encode_wav(wave, rate))
    out.print(f"{len(wave) / rate:.2f} s of audio: {out_file}")


@app.command()
def embed(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(help="Texts, images and recordings.")],
    out_file: Annotated[Path | None, typer.Option("-o", "--out", help="A .npy file; default: JSON lines.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Place texts, images and audio clips in one space.

    Example: plait embed runs/demo "three" runs/demo/files/images/0003.png
    """
    import io
    import json

    import numpy as np

    loaded = load(model, device, precision)
    values = [media_or_text(value) for value in inputs]
    for value in values:
        note_windows(loaded, value)
    vectors = loaded.embed(values)
    if out_file is not None:
        array = io.BytesIO()
        np.save(array, vectors)
        write(out_file, array.getvalue())
        out.print(f"{vectors.shape[0]} vectors of {vectors.shape[1]}: {out_file}")
        return
    for name, vector in zip(inputs, vectors, strict=True):
        out.print(plain(json.dumps({"input": name, "embedding": [round(float(x), 6) for x in vector]})))


@app.command()
def export(
    model: ModelArgument,
    out_folder: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="transformers, onnx or tflite.")] = "transformers",
    length: Annotated[int | None, typer.Option(help="Positions of a tflite graph; by itself 512 at most.")] = None,
) -> None:
    """Write the text-and-codes backbone for other programs. docs/export.md says what each form can do.

    Example: plait export runs/demo --to transformers -o exported
    """
    from plait.core.dist import check_extra
    from plait.core.errors import PlaitError
    from plait.hf.export import export_onnx, export_transformers
    from plait.hf.export_constraints import add_export_constraints
    from plait.hf.tflite import export_tflite
    from plait.inference.model import Model as OurModel

    formats: dict[str, Callable[..., object]] = {
        "transformers": export_transformers,
        "onnx": export_onnx,
        "tflite": partial(export_tflite, length=length, tell=lambda line: out.print(plain(line))),
    }
    if to not in formats:
        raise PlaitError(f"Unknown format '{to}'. Use {', '.join(formats)}.")
    if length is not None and to != "tflite":
        raise PlaitError("--length is of --to tflite alone: the others take texts of any length.")
    if to == "onnx":
        for module in ("onnx", "onnxruntime"):
            check_extra(module, "onnx", "Export to ONNX")
    loaded = load(model, "cpu")
    if not isinstance(loaded, OurModel):
        raise PlaitError(
            f"{model} runs in transformers already; only GPT-2, Llama, Qwen3 and Plait models are exported."
        )
    if loaded.checkpoint.catalogue is not None:
        raise PlaitError(f"{model} knows histories of items, which no other program reads; nothing is written.")
    worst = formats[to](add_export_constraints(loaded.checkpoint, loaded.engine), out_folder)
    if isinstance(worst, float):
        out.print(f"Compared: logits within {worst:.1e} of ours")
    out.print(f"Written: {out_folder}")
