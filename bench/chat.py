"""Chat, auto-reply, intents and emotions on synthetic data, each beside its baseline.

    python bench/chat.py -o runs/talk [--seeds 0 1 2] [--only chat replies intents feelings emotions few]

makes the data (bench/make_conversations.py), trains every model that is not there yet with the packaged recipes,
and writes OUT/talk.json. Phrasings, voices, spoken sentences and unanswerable questions of test do not occur in train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import plait
from plait.chat.replies import Replies, same
from plait.core.files import write_json
from plait.data import conversations as conversations
from plait.data.dataset import Dataset
from plait.inference.prompts import Chat, Turn

HERE = Path(__file__).resolve().parent.parent
RECIPES = {"replies": "replies", "intents": "intents", "feelings": "intents", "emotions": "emotions", "chat": "chat"}
COLUMNS = {"intents": ("said", "intent"), "feelings": ("said", "feeling"), "emotions": ("audio", "emotion")}
SHOTS = (1, 5)


def command(*arguments: object) -> float:
    """Run `plait`; returns the processor's seconds."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "plait", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def data(out: Path, name: str) -> Path:
    folder = out / f"data-{name}"
    if not (folder / "manifest.json").is_file():
        more = ("--map", "ignore=kind") if name == "chat" else ()
        command("prepare", out / "files" / name, "-o", folder, *more)
    return folder


def train(out: Path, name: str, seed: int, *more: object, kind: str | None = None) -> Path:
    run = out / f"{name}-{seed}"
    kind = kind or name
    if not (run / "run.json").is_file() or "finished" not in json.loads((run / "run.json").read_text()):
        recipe = ("--recipe", RECIPES[kind]) if kind in RECIPES else ()
        seconds = command("train", data(out, kind), "-o", run, *recipe, "--seed", seed, *more)
        (run / "seconds.json").write_text(json.dumps(round(seconds, 1)))
    return run


def seconds_of(run: Path) -> float | None:
    file = run / "seconds.json"
    return float(json.loads(file.read_text())) if file.is_file() else None


# --- recognition ------------------------------------------------------------------------------------------------


def examples(dataset: Dataset, source: str, target: str, split: str) -> tuple[list[Any], list[str]]:
    found = [record.parts for record in dataset.iterate(dataset.indices(split), [source, target])]
    found = [parts for parts in found if source in parts and target in parts]
    return [parts[source] for parts in found], [str(parts[target]) for parts in found]


def scores(truth: list[str], said: list[str]) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(truth, said)),
        "recall": float(recall_score(truth, said, average="macro", zero_division=0)),
        "f1": float(f1_score(truth, said, average="macro", zero_division=0)),
        "n": len(truth),
    }


def said_by(model: plait.Model, inputs: list[Any], column: str, labels: list[str]) -> list[str]:
    return [model.classify(value, labels=labels, column=column, top=1)[0][0] for value in inputs]


def plain(model: plait.Model, train_: tuple[list[Any], list[str]], test: list[Any]) -> list[str]:
    """Logistic regression on what the model reads: the counts of its tokens, or means and deviations of its log-mel."""
    if isinstance(test[0], str):
        text = model.checkpoint.text
        counts = CountVectorizer(analyzer=lambda value: text.encode(value))
        judge = make_pipeline(counts, LogisticRegression(max_iter=2000))
        return list(judge.fit(*train_).predict(test))
    modality = model.checkpoint.model.media["audio"]

    def features(values: list[Any]) -> np.ndarray:
        samples = [modality.windows(value)[0].astype(np.float32) for value in values]
        return np.array([[*x.mean(0), *x.std(0), len(x)] for x in samples])

    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return list(judge.fit(features(train_[0]), train_[1]).predict(features(test)))


def recognition(out: Path, name: str, seed: int) -> dict[str, Any]:
    run = train(out, name, seed)
    model, dataset = plait.load(run, "cpu"), Dataset.open(data(out, name))
    source, target = COLUMNS[name]
    inputs, truth = examples(dataset, source, target, "test")
    known = examples(dataset, source, target, "train")
    labels = sorted(set(known[1]))
    return {
        **scores(truth, said_by(model, inputs, target, labels)),
        "logistic regression": scores(truth, plain(model, known, inputs)),
        "chance f1": float(f1_score(truth, [labels[0]] * len(truth), average="macro", zero_division=0)),
        "cpu seconds": seconds_of(run),
    }


def few(out: Path, seed: int) -> dict[str, Any]:
    """Feelings by a model of intents: never trained on them, and with a few examples of each, from there and anew."""
    base = train(out, "intents", seed)
    dataset = Dataset.open(data(out, "feelings"))
    source, target = COLUMNS["feelings"]
    inputs, truth = examples(dataset, source, target, "test")
    labels = sorted(set(truth))
    model = plait.load(base, "cpu")
    found: dict[str, Any] = {"zero-shot": scores(truth, said_by(model, inputs, "intent", labels))}
    texts, names = examples(dataset, source, target, "train")
    for shots in SHOTS:
        order = np.random.default_rng(seed).permutation(len(texts))
        chosen = [i for label in labels for i in [j for j in order if names[j] == label][:shots]]
        files = out / "files" / f"few-{shots}-{seed}"
        files.mkdir(parents=True, exist_ok=True)
        rows = [{"said": texts[i], "feeling": names[i], "split": "train"} for i in chosen]
        (files / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        name = f"few-{shots}-{seed}"
        recipe = out / "few.yaml"
        recipe.write_text("training: {steps: 150, batch_size: 16, weights: {said: 0}, learning_rate: 1.0e-3}\n")
        for how, more in {"from intents": ("--init-from", base), "anew": ()}.items():
            run = out / f"{name}-{how.replace(' ', '-')}"
            if not (run / "checkpoints").is_dir():
                command("train", data(out, name), "-o", run, "--recipe", recipe, "--seed", seed, *more)
            learnt = plait.load(run, "cpu")
            found[f"{shots} each, {how}"] = scores(truth, said_by(learnt, inputs, "feeling", labels))
        known = [texts[i] for i in chosen], [names[i] for i in chosen]
        found[f"{shots} each, logistic regression"] = scores(truth, plain(model, known, inputs))
    return found


# --- auto-reply -------------------------------------------------------------------------------------------------


def replies(out: Path, seed: int) -> dict[str, Any]:
    run = train(out, "replies", seed)
    dataset = Dataset.open(data(out, "replies"))
    there = Replies(dataset)
    fitted = there.fit()
    asked = list(dataset.iterate(dataset.indices("test")))
    known = [(str(r.parts["question"]), str(r.parts["reply"])) for r in asked if "reply" in r.parts]
    never = [str(r.parts["question"]) for r in asked if "reply" not in r.parts]
    begun = time.perf_counter()
    answers = there.answer([question for question, _ in known])
    each = (time.perf_counter() - begun) / len(known)
    pairs = list(zip(answers, (reply for _, reply in known), strict=True))
    right = [answer.reply is not None and same(answer.reply, reply) for answer, reply in pairs]
    wrong = [answer.reply is not None and not ok for answer, ok in zip(answers, right, strict=True)]
    silent = [answer.reply is None for answer in there.answer(never)]
    nearest = [same(answer.sources[0].reply, reply) for answer, reply in pairs]
    return {
        "right": float(np.mean(right)), "wrong": float(np.mean(wrong)), "n": len(right),
        "silent on unanswerable": float(np.mean(silent)), "n unanswerable": len(silent),
        "nearest past reply right": float(np.mean(nearest)), "threshold": fitted.threshold,
        "seconds each": round(each, 3), "cpu seconds": seconds_of(run),
    }  # fmt: skip


# --- chat -------------------------------------------------------------------------------------------------------


def chat(out: Path, seed: int) -> dict[str, Any]:
    base = train(out, "facts", seed, "--size", "tiny", "--steps", 700)
    runs = {
        "base": base,
        "full": train(out, "chat", seed, "--init-from", base),
        "LoRA": train(out, "chat-lora", seed, "--init-from", base, "--lora", "--learning-rate", 4e-3, kind="chat"),
        "no base": train(out, "chat-anew", seed, kind="chat"),
    }
    rows = [json.loads(line) for line in (out / "files" / "chat" / "chats.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"]
    found: dict[str, Any] = {}
    for name, run in runs.items():
        model = plait.load(run, "cpu")
        talk = Chat(model, run / "checkpoints" / "best")
        result: dict[str, Any] = {"cpu seconds": seconds_of(run)}
        for kind in ("taught", "base"):
            mine = [row["messages"] for row in test if row["kind"] == kind]
            result[f"facts {kind}"] = _turns(model, talk, mine)
        found[name] = result
    stored = Dataset.open(data(out, "chat"))
    turns = [conversations.turns(str(text)) for text in stored.texts("messages") if text]
    found["assistant's turns in all"] = sum(turn.role == "assistant" for one in turns for turn in one)
    return found


@torch.no_grad()
def _turns(model: plait.Model, talk: Chat, rows: list[list[dict[str, str]]]) -> dict[str, float]:
    """Replies to the last message: the likelihood of the true one, and whether it is what the model writes."""
    prompts = [talk.prompt([Turn(m["role"], [m["content"]]) for m in row[:-1]]) for row in rows]
    truth = [row[-1]["content"] for row in rows]
    lead = " " if prompts[0].strip else ""
    ids = model.checkpoint.text.encode_batch([lead + text for text in truth])
    nats = tokens = 0.0
    for prompt, row in zip(prompts, ids, strict=True):
        nats -= _log_likelihood(model, prompt.context.ids, row)
        tokens += len(row)
    stop = [*prompts[0].stop, "\n"]
    written = model.reply([prompt.context for prompt in prompts], stop=stop, max_new_tokens=24)
    exact = np.mean([same(a, b) for a, b in zip(written, truth, strict=True)])
    return {"nats a token": nats / tokens, "exact": float(exact), "n": len(rows)}


def _log_likelihood(model: plait.Model, context: list[int], ids: list[int]) -> float:
    inner = model.checkpoint.model
    whole = torch.tensor([[*context, *ids]])
    hidden = inner.backbone(torch.nn.functional.embedding(whole, inner.token_embedding.table()))[
        0, len(context) - 1 : -1
    ]
    chances = inner.logits(hidden, "text").float().log_softmax(-1)
    return float(chances.gather(1, torch.tensor(ids)[:, None]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/talk"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    tasks: dict[str, Callable[[int], dict[str, Any]]] = {
        "chat": lambda seed: chat(out, seed),
        "replies": lambda seed: replies(out, seed),
        **{name: (lambda seed, name=name: recognition(out, name, seed)) for name in COLUMNS},
        "few": lambda seed: few(out, seed),
    }
    parser.add_argument("--only", nargs="+", choices=list(tasks), default=list(tasks))
    chosen = parser.parse_args()
    out = chosen.out
    if not (out / "files").is_dir():
        subprocess.run([sys.executable, HERE / "bench" / "make_conversations.py", out / "files"], check=True)
    results = json.loads((out / "talk.json").read_text()) if (out / "talk.json").is_file() else {}
    for name in chosen.only:
        for seed in chosen.seeds:
            results.setdefault(name, {})[str(seed)] = tasks[name](seed)
            write_json(out / "talk.json", results)
            print(name, seed, json.dumps(results[name][str(seed)], indent=1), flush=True)


if __name__ == "__main__":
    main()
