"""Text held to JSON schemas: how many of 200 random ones give valid JSON, and what a token takes beside free text.

    OMP_NUM_THREADS=1 python bench/constrained.py                            # a 14M model with random weights
    OMP_NUM_THREADS=1 python bench/constrained.py --model gemma3-270m        # an imported one

A token of both is timed with the same prompt, the same number of tokens and the same sampling, in turns; compiling a
schema comes before and is reported apart.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from serving import write_model

import plait

PROMPT = "Write down what you know about the weather, as a record: "
MOST = 400  # tokens


def random_schema(choose: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of a value whose size is bounded, as clients send them."""
    simple = ("string", "integer", "boolean", "number", "enum", "const", "pattern")
    kind = choose.choice(simple if depth > 1 else (*simple, "object", "object", "array", "anyOf"))
    if depth == 0:
        kind = "object"
    if kind == "string":
        return {"type": "string", "maxLength": choose.randint(1, 12)}
    if kind == "integer":
        low = choose.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + choose.randint(0, 500)}
    if kind == "enum":
        return {"enum": [choose.choice(["red", "green", 7, None, True, "x y"]) for _ in range(choose.randint(1, 4))]}
    if kind == "const":
        return {"const": choose.choice(["fixed", 3])}
    if kind == "pattern":
        return {"type": "string", "pattern": choose.choice(["^[a-z]{2,5}$", "^[0-9]{4}-[0-9]{2}$", "^(ab|cd)?e$"])}
    if kind == "array":
        return {"type": "array", "items": random_schema(choose, depth + 1), "minItems": choose.randint(0, 2),
                "maxItems": 3}  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [random_schema(choose, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = choose.sample(["name", "age", "tags", "city name", "ü", "nested", "a-b"], choose.randint(1, 4))
        properties = {name: random_schema(choose, depth + 1) for name in names}
        required = names if choose.random() < 0.6 else names[:1]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what plait.load takes; else 14M parameters with random weights")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            write_model(Path(folder) / "model")
        measure(plait.load(arguments.model or f"{folder}/model"), arguments.schemas, arguments.seed)


def measure(model: Any, schemas: int, seed: int) -> None:
    choose = random.Random(seed)
    context = model.context([PROMPT], None)
    invalid, unfinished, ratios, compiling = 0, 0, [], []
    for number in range(schemas):
        schema = random_schema(choose)
        Draft202012Validator.check_schema(schema)
        began = time.perf_counter()
        constraint = model.constraint(schema=schema)
        compiling.append(time.perf_counter() - began)
        options = {"temperature": 1.0, "seed": number}
        held, seconds = run(model, context, {**options, "constraint": constraint, "max_new_tokens": MOST})
        if held.finish == "length":
            unfinished += 1
            continue
        try:
            invalid += not Draft202012Validator(schema).is_valid(json.loads(held.text))
        except ValueError:
            invalid += 1
        if len(held.ids) >= 8:
            free, free_seconds = run(model, context, {**options, "max_new_tokens": len(held.ids)})
            if len(free.ids) >= 8:
                ratios.append((seconds / len(held.ids)) / (free_seconds / len(free.ids)))
    ratios.sort()
    print(
        f"{schemas} schemas: {schemas - invalid - unfinished} valid, {invalid} not, {unfinished} not finished within "
        f"{MOST} tokens; compiled in {1000 * statistics.median(compiling):.1f} ms (median), at most "
        f"{1000 * max(compiling):.0f}; a token takes {statistics.median(ratios):.3f} of one of free text (median of "
        f"{len(ratios)}; {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f})"
    )


def run(model: Any, context: Any, options: dict[str, Any]) -> tuple[Any, float]:
    """What was written, and the seconds that it took."""
    request = model.request(context, "text", **options)
    began = time.perf_counter()
    written = model.engine.run([request])[0].samples[0]
    return written, time.perf_counter() - began


if __name__ == "__main__":
    main()
