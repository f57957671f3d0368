"""lm-evaluation-harness: multiple choice, perplexity and generation over HTTP, beside its own model."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from common import URL
from lm_eval.tasks import TaskManager

CHECKPOINT = os.environ["PLAIT_CHECKPOINT"]
WORDS = ["the cat sat on the mat", "a dog ran in the park", "birds sing at dawn"]
TASKS = {
    "choice": ("multiple_choice", {"doc_to_text": "{{text}}", "doc_to_choice": ["sat", "ran", "sing"]}, "acc"),
    "text": ("loglikelihood_rolling", {"doc_to_text": "", "doc_to_target": "{{text}}"}, "word_perplexity"),
    "write": ("generate_until", {"doc_to_text": "{{text}}", "generation_kwargs": {
        "until": ["\n"], "do_sample": False, "max_gen_toks": 12}}, "exact_match"),
}  # fmt: skip

with tempfile.TemporaryDirectory() as folder:
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(WORDS * 2)]
    data = Path(folder) / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, more, metric) in TASKS.items():
        task = {"task": f"plait_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test", "output_type": kind, "doc_to_target": "{{label}}", **more,
                "metric_list": [{"metric": metric}]}  # fmt: skip
        if kind == "multiple_choice":
            task["doc_to_target"] = "label"
        (Path(folder) / f"{name}.yaml").write_text(json.dumps(task))
    tasks = TaskManager(include_path=folder, include_defaults=False)

    def measure(kind: str, /, **arguments: object) -> dict:
        return lm_eval.simple_evaluate(
            model=kind, model_args=arguments, tasks=[f"plait_{name}" for name in TASKS], task_manager=tasks,
            batch_size=1, log_samples=True, bootstrap_iters=0, device="cpu",
        )  # fmt: skip

    ours = measure("local-completions", model="caller", base_url=f"{URL}/v1/completions", tokenizer=CHECKPOINT,
                   tokenizer_backend="huggingface", max_length=2048, num_concurrent=1, max_retries=1)  # fmt: skip
    theirs = measure("hf", pretrained=CHECKPOINT, dtype="float32", max_length=2048)

for name, (_, _, metric) in TASKS.items():
    a, b = (found["results"][f"plait_{name}"] for found in (ours, theirs))
    key = f"{metric},none"
    assert abs(a[key] - b[key]) <= 1e-3 * abs(b[key]) + 1e-6, (name, a, b)
    for mine, other in zip(*(found["samples"][f"plait_{name}"] for found in (ours, theirs)), strict=True):
        left, right = mine["filtered_resps"], other["filtered_resps"]
        if name == "write":
            assert left == right, (left, right)
        elif name == "choice":
            pairs = [(float(x[0]), float(y[0])) for x, y in zip(left, right, strict=True)]
            assert all(abs(x - y) < 0.01 for x, y in pairs), pairs
