"""Typed questions answered by probabilities: from Python, the command line, and over HTTP in two shapes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import plait as api
from conftest import EN, make_image, tone
from plait.inference.decisions import Decision, Option, Question, read_questions
from server import Server, is_error, write_imports


@pytest.fixture(scope="module")
def image() -> bytes:
    buffer = io.BytesIO()
    make_image(2, np.random.default_rng(7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("decisions")
    with Server.start(folder / "log", trained, write_imports(folder)["bytes"]) as running:
        yield running


def choice(*values: str, text: str = "Which is it?", kind: Any = "choice") -> Question:
    return Question(kind, text, tuple(map(Option, values)), kind)


def test_what_was_learnt_answers(trained: Path, image: bytes) -> None:
    model = api.load(trained)
    ranked = {one.label: one.probability for one in model.classify(image, column="en", top=None)}
    whole, part, so, level, foreign = model.decide(image, [
        choice(*EN), choice(EN[1], EN[0]), Question("predicate", f"en: {EN[0].upper()}"),
        choice(*EN[:3], kind="score"), choice("cat", "dog"),
    ])  # fmt: skip
    assert whole.probabilities == pytest.approx([ranked[label] for label in EN], abs=1e-6)
    assert (part.column == "en" and part.probabilities == pytest.approx(
        [ranked[label] / (ranked[EN[0]] + ranked[EN[1]]) for label in (EN[1], EN[0])], abs=1e-6
    )) or part.refusal  # fmt: skip
    assert so.probabilities == pytest.approx([ranked[EN[0]], 1 - ranked[EN[0]]])
    assert level.refusal or level.expected == pytest.approx(float(np.dot(level.probabilities, [0, 1, 2])))
    assert not foreign.probabilities and "not the labels" in foreign.refusal
    named = Question("predicate", "Is it one of these?", (), EN[0])
    assert model.decide(image, [named])[0].probabilities == so.probabilities
    # A sentence may say the opposite, in any language: a label inside one is not looked for.
    for text, why in (("It is no red bar", "no label"), ("horse", "no label"), (f"{EN[0]} or {EN[1]}?", "no label")):
        assert why in model.decide(image, [Question("predicate", text)])[0].refusal


def test_confidence_is_the_distance_from_a_guess() -> None:
    for kind in ("choice", "score"):
        question = choice("a", "b", "c", kind=kind)
        assert Decision(question, [1 / 3, 1 / 3, 1 / 3]).confidence == pytest.approx(0, abs=0.01)
        assert Decision(question, [0.0, 1.0, 0.0]).confidence == 1
    assert Decision(choice("a", "b", kind="score"), [0.5, 0.5]).expected == 0.5


def test_command(trained: Path, image: bytes, plait: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.png").write_bytes(image)
    (tmp_path / "q.json").write_text(json.dumps([{"type": "score", "instructions": "How?", "levels": [
        {"label": label} for label in EN]}]))  # fmt: skip
    asked = ["--is", EN[0], "--choice", ",".join(EN), "--questions", tmp_path / "q.json"]
    assert plait("decide", trained, tmp_path / "a.png", *asked, "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert [one["type"] for one in answers] == ["predicate", "choice", "score"] and answers[1]["probabilities"]
    assert plait("decide", trained, tmp_path / "a.png") == 1
    with pytest.raises(api.PlaitError, match="two options"):
        read_questions([{"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}])


def test_openai_client(server: Server, image: bytes, trained: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    made = client.decisions.create(
        model="run",
        input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}],
        questions=[
            {"type": "choice", "name": "what", "instructions": "What is it?", "choices": [{"value": v} for v in EN]},
            {"type": "predicate", "name": EN[0], "instructions": f"It is a {EN[0]}."},
            {"type": "score", "name": "level", "instructions": "How?", "levels": [{"label": v} for v in EN]},
            {"type": "choice", "name": "other", "instructions": "?", "choices": [{"value": True}, {"value": "x"}]},
        ],
    )  # fmt: skip
    what, red, level, other = made.answers
    local = api.load(trained).classify(image, column="en", top=None)
    assert what.type == "choice" and what.name == "what" and what.choice == local[0].label
    assert {one.value: one.probability for one in what.probabilities} == pytest.approx(dict(local), abs=1e-5)
    assert red.type == "predicate" and red.probability == pytest.approx(dict(local)[EN[0]], abs=1e-5)
    assert level.type == "score" and [one.value for one in level.probabilities] == list(range(len(EN)))
    assert other.type == "refusal" and "not the labels" in other.plait["reason"]
    assert made.model == "run" and made.usage.output_tokens == 0


def test_system_one(server: Server, image: bytes) -> None:
    sound = base64.b64encode(tone(2, np.random.default_rng(7))).decode()
    body = {
        "model": "run", "state": "photo-1", "assets": {"photo-1": {"data_base64": base64.b64encode(image).decode()}},
        "questions": {
            "it": {"type": "choice", "instructions": "What?", "criteria": dict.fromkeys(EN)},
            "so": {"type": "noul", "instructions": EN[0]},
            "how": {"type": "score", "instructions": "?", "criteria": EN},
        },
    }  # fmt: skip
    status, made = server.post("/v1/systemone", body)
    assert status == 200, made
    assert set(made["answers"]["it"]["probabilities"]) == set(EN) and 0 <= made["answers"]["so"]["noul"] <= 1
    assert made["answers"]["how"]["legend"]["0"] == EN[0]
    status, heard = server.post("/systemone", {**body, "assets": {"photo-1": {"data_base64": sound}}})
    assert status == 200 and heard["answers"].keys() == made["answers"].keys()
    # A language model weighs the options, of text.
    asked = {"ok": {"type": "noul", "instructions": "Is it so?"}}
    status, made = server.post("/v1/systemone", {"model": "bytes", "state": {"a": "the cat"}, "questions": asked})
    assert status == 200 and not made["answers"]["ok"]["plait"]["calibrated"] and 0 < made["answers"]["ok"]["noul"] < 1


@pytest.mark.parametrize("wrong", [
    {"questions": []},
    {"questions": [{"type": "choice", "instructions": "x"}]},
    {"questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}, {"value": "a"}]}]},
    {"questions": [{"type": "guess", "instructions": "x"}]},
    {"input": ""},
    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/a.png"}]}]},
])  # fmt: skip
def test_requests_that_mean_nothing(server: Server, wrong: dict[str, Any]) -> None:
    body = {"model": "run", "input": "x", "questions": [{"type": "predicate", "instructions": "x"}], **wrong}
    status, _, answer = server.ask("POST", "/v1/decisions", body)
    assert status == 400 and is_error(status, answer), answer
