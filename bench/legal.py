"""What plain transformers samples from an exported run: how many tokens the span grammar has no place for.

    python bench/legal.py runs/demo                     # 200 tokens at most after each prompt, as exported
    python bench/legal.py runs/demo --seeds 8 --bf16 --min-p 0

Prompts are texts of the run alone, which go on as text or open a span, and with the opener of each column behind. Of
every sample, what comes after the first token out of place is not counted: a span that is lost stays lost.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import plait
from plait.core.device import threads
from plait.hf.export import export_transformers
from plait.hf.export_constraints import add_export_constraints
from plait.inference.grammar import Span, spans
from plait.modalities.base import Vocabulary


def misplaced(vocabulary: Vocabulary, grammar: dict[str, Span], column: str | None, ids: list[int]) -> tuple[int, str]:
    """(tokens up to the first that is out of place, that one counted; what is wrong with it, "" where nothing is).

    `column` is the one that was opened by the prompt, None where the prompt is text alone. All is told from the
    vocabulary's ranges, one token after another, without the engine.
    """
    openers = {vocabulary.opener(name): name for name in vocabulary.columns}
    count, closed = 0, False
    for place, token in enumerate(ids, 1):
        token_type = "text" if column is None else vocabulary.columns[column]
        lies = next(name for name, (start, stop) in vocabulary.id_ranges.items() if start <= token < stop)
        span = grammar[token_type]
        if closed:
            if token != vocabulary.end:
                return place, f"{token_type} goes on after its end"
            return place, ""
        if token_type == "text":
            if token == vocabulary.end:
                return place, ""
            if column is None and token in openers:
                column, count = openers[token], 0
            elif lies != "text" or token >= vocabulary.text:
                return place, f"{lies if lies != 'text' else 'a special token'} in text"
            continue
        if lies != token_type:
            return place, f"{token_type} ended early" if token == vocabulary.end else f"{lies} in {token_type}"
        if token_type in vocabulary.closers and token == vocabulary.closer(token_type):
            if count < span.least or count % span.unit:
                return place, f"{token_type} closed within a group of codes"
            closed = True
            continue
        count += 1
        if token_type not in vocabulary.closers:
            closed = count == span.limit
        elif span.limit is not None and count > span.limit:
            return place, f"{token_type} too long"
    return len(ids), ""


def sample(
    reader: Any, vocabulary: Vocabulary, prompts: list[list[int]], columns: list[str | None], each: int, tokens: int
) -> list[tuple[str | None, list[int]]]:
    """(column, what was written after a prompt), `each` samples for every prompt and column."""
    found: list[tuple[str | None, list[int]]] = []
    for column in columns:
        contexts = [
            ids if column is None else [*ids, vocabulary.opener(column)] for ids in prompts for _ in range(each)
        ]
        for length in sorted({len(context) for context in contexts}):
            batch = torch.tensor([context for context in contexts if len(context) == length])
            room = min(tokens, reader.config.max_position_embeddings - length)
            made = reader.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=room)
            for row in made[:, length:].tolist():
                stop = row.index(vocabulary.end) + 1 if vocabulary.end in row else len(row)
                found.append((column, row[:stop]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--each", type=int, default=8, help="samples of each prompt and column")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens at most")
    parser.add_argument("--bf16", action="store_true", help="the export is loaded in bf16")
    parser.add_argument("--min-p", type=float, help="in place of the exported one")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = plait.load(options.run, device="cpu", precision="fp32")
    checkpoint = loaded.checkpoint
    vocabulary, grammar = checkpoint.model.vocabulary, spans(checkpoint.model)
    with tempfile.TemporaryDirectory() as folder:
        export_transformers(add_export_constraints(checkpoint, loaded.engine), Path(folder) / "model")
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        reader = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    if options.min_p is not None:
        reader.generation_config.min_p = options.min_p
    texts = [label for labels in checkpoint.labels.values() for label in labels]
    prompts = [tokenizer(text).input_ids for text in texts]
    columns = [None, *(name for name in vocabulary.columns if name not in checkpoint.model.config.read_only)]
    print(f"min_p {reader.generation_config.min_p}; {len(prompts)} texts, {len(columns)} ways to go on")
    total, samples, wrong = 0, 0, Counter[str]()
    for seed in range(options.seeds):
        set_seed(seed)
        for column, ids in sample(reader, vocabulary, prompts, columns, options.each, options.tokens):
            count, kind = misplaced(vocabulary, grammar, column, ids)
            total, samples = total + count, samples + 1
            wrong[f"{column or 'no column'}: {kind}"] += bool(kind)
        print(f"seed {seed}: {sum(wrong.values())} of {total} tokens in {samples} samples so far", flush=True)
    for kind, count in wrong.most_common():
        if count:
            print(f"  {count}  {kind}")
    if not sum(wrong.values()):
        print(f"None of {total}: with 95 % confidence fewer than {3 / total:.2g} of all.")


if __name__ == "__main__":
    main()
