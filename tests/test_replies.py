"""Auto-reply: right answers with their sources, silence for what was never asked."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import plait as package
from plait.chat.nearness import Bm25
from plait.chat.replies import Replies, open_replies
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.evaluation.keys import MetricKey
from plait.reports.metric_labels import headline_keys
from server import Server

Plait = Callable[..., int]
THINGS = {"a tent": "Tents are at the back.", "my parcel": "See the link.", "the hours": "From nine to six.",
          "a voucher": "On the last page.", "my size": "Look at the table."}  # fmt: skip
FRAMES = [
    "What about {x}?",
    "I ask for {x}.",
    "hello, {x}?",
    "Tell me of {x}.",
    "Now {x}, please.",
    "{x}, how?",
    "Is {x} there?",
    "I need {x}.",
    "where is {x}",
    "Can I have {x} now?",
    "Do you have {x}?",
    "So {x} then.",
]
NEVER = ["zebras jump", "quiet volcano", "xylophone", "foggy jungle", "jazz club", "wizard hoaxes"]
RECIPE = """
model: {backbone: {width: 48, layers: 2, heads: 4, context: 64}, text: {vocabulary: 280}}
training: {steps: 150, batch_size: 16, learning_rate: 4.0e-3, weights: {question: 0}, validations: 3}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, plait: Plait) -> Path:
    place = tmp_path_factory.mktemp("replies")
    rows = []
    for thing, reply in THINGS.items():
        for n, frame in enumerate(FRAMES):
            split = "test" if n == 5 else "val" if n > 8 else "train"
            rows.append({"question": frame.format(x=thing), "reply": reply, "split": split})
    rows += [{"question": text, "reply": "", "split": "val" if n % 2 else "test"} for n, text in enumerate(NEVER)]
    (place / "files").mkdir()
    with (place / "files" / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (place / "recipe.yaml").write_text(RECIPE)
    assert plait("prepare", place / "files", "-o", place / "data", "--workers", 0) == 0
    assert plait("train", place / "data", "-o", place / "run", "--recipe", place / "recipe.yaml") == 0
    return place / "run"


def test_answers_and_silence(run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [f"Someone here asked us of {thing}." for thing in THINGS]  # in no record
    never = ["quarrels vex mighty fjords", "bumpy kiwi syrup", "glyphs of crypts"]
    capsys.readouterr()
    assert plait("reply", run, *asked, *never, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [one["reply"] == reply for one, reply in zip(found, THINGS.values(), strict=False)]
    silent = [one["reply"] is None for one in found[len(asked) :]]
    assert sum(right) >= 4 and sum(silent) >= 2
    assert all(len(one["sources"]) == 3 and 0 <= one["confidence"] <= 1 and not one["composed"] for one in found)
    nearest = found[0]["sources"][0]
    assert nearest["reply"] == THINGS["a tent"] and 0 < nearest["nearness"] <= 1
    fitted = json.loads((run / "replies.json").read_text())
    assert fitted["confidence"]["measured"] == len(NEVER) and fitted["pairs"] == len(THINGS) * len(FRAMES)

    # Fitted once; the least confidence can be set by hand, and messages may come through a pipe.
    (run / "replies.json").write_text(json.dumps({**fitted, "confidence": {**fitted["confidence"], "threshold": 0.0}}))
    assert plait("reply", run, NEVER[0], "--json") == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == 0
    assert plait("reply", run, asked[0], "--least", 1) == 0
    assert capsys.readouterr().out.startswith("(silence)")
    (run / "replies.json").unlink()


def test_a_model_composes_where_asked(run: Path) -> None:
    replies = open_replies(run, None, None, None, model=package.load(run))
    assert replies.answer(["What about a tent?"], compose=True)[0].composed
    with pytest.raises(PlaitError, match="composed by a model"):
        open_replies(run, None, None, None).answer(["What about a tent?"], compose=True)
    (run / "replies.json").unlink()


def test_confidence_is_the_share_of_unanswerable_messages_that_stand_out_less(run: Path) -> None:
    replies = Replies(Dataset.open(run.parent / "data"))
    assert (replies.question, replies.reply) == ("question", "reply")
    fitted = replies.fit()
    leads = []
    for text, reply in zip(replies.questions, replies.replies, strict=True):  # each as if its reply were not known
        near = (replies.nearness([text])[0] @ replies.shares)[np.array(replies.replies) != reply]
        others = np.array(replies.replies)[np.array(replies.replies) != reply]
        best = near.argmax()
        leads.append(near[best] - near[others != others[best]].max())
    leads += [one for one in fitted.leads if not np.isclose(one, leads).any()]  # those of questions without a reply
    assert np.allclose(np.sort(leads)[-5:], fitted.leads[-5:]) and fitted.measured == len(NEVER)
    answer = replies.answer([f"Someone here asked us of {next(iter(THINGS))}."])[0]
    assert answer.confidence == len(leads) / (len(leads) + 1) > answer.threshold  # it leads by more than any of them


def test_words_that_say_more_weigh_more() -> None:
    found = Bm25(["how do I renew a loan", "how do I print", "how do I pay"])
    scores = found("please, renewal of my book: how?")
    assert scores.argmax() == 0 and scores[0] > 2 * scores[1]
    assert found.rarity("renew") > found.rarity("how") and found.shared("renewal", 0)[0] == found.rarity("renew")


def test_mistakes(run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]) -> None:
    model = package.load(run)
    with pytest.raises(PlaitError, match=r"weights\.question: 0"):
        model.generate("See the link.", to="question")
    for command, message in [
        (("reply", run, "hi", "--question", "colour"), "no 'colour' among question, reply"),
        (("reply", run / "checkpoints" / "best", "hi"), "Name them with --data"),
        (("reply", run, "hi", "--data", run), "is not a dataset"),
    ]:
        assert plait(*command) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_of_pairs_is_measured_told_and_served_as_what_it_is(
    run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = open_replies(run).measure()
    assert left_out.answerable == len(THINGS) * len(FRAMES) and left_out.unanswerable == 0
    assert left_out.right > 10 and left_out.wrong < 3  # their frames are all alike, so that it is often silent
    capsys.readouterr()
    assert plait("evaluate", run, "--reference-seconds", 1) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{left_out.right / left_out.answerable:.1%} answered right" in shown and "plait reply RUN" in shown
    names = list(json.loads((run / "metrics.json").read_text()))
    written = MetricKey.parse("transcription/question-reply/wer")  # of the network, which does not answer
    assert written not in headline_keys([*map(MetricKey.parse, names), written])
    assert headline_keys([written]) == [written]

    with Server.start(run.parent / "log", f"shop={run}") as server:
        body = {"messages": ["What about a tent?", NEVER[2]], "sources": 1}
        status, found = server.post("/v1/plait/reply", body)
        assert status == 200 and [one["reply"] for one in found["data"]] == [THINGS["a tent"], None]
        assert found["data"][0]["sources"][0]["question"] == "What about a tent?"

        def chat(text: str, **more: object) -> dict[str, object]:
            asked = {"model": "shop", "messages": [{"role": "user", "content": text}], **more}
            return dict(server.post("/v1/chat/completions", asked)[1]["choices"][0]["message"])

        assert chat("What about a tent?")["content"] == THINGS["a tent"]
        silent = chat(NEVER[2])
        assert silent["content"] is None and silent["refusal"]
        streamed = server.ask("POST", "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "What about a tent?"}], "stream": True,
        })[2].decode()  # fmt: skip
        assert THINGS["a tent"] in streamed and streamed.endswith("data: [DONE]\n\n")
        status, refused = server.post("/v1/responses", {"model": "shop", "input": "What about a tent?"})
        assert status == 400 and "/v1/plait/reply" in refused["error"]["message"]


def test_a_run_is_handed_over_with_its_past_replies(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    from plait.studio.handover import export, offered
    from plait.studio.snippets import snippets
    from plait.studio.workspace import Project

    assert offered(package.load(run), run) == ["pairs"]
    (only,) = snippets(run, ["generate", "classify", "embed"], ["text", "text"])
    assert only.verb == "reply" and "/v1/plait/reply" in only.curl and "plait.open_replies(run)" in only.python
    written = export(Project(tmp_path), run, "pairs")
    with zipfile.ZipFile(written) as file:
        file.extractall(tmp_path / "elsewhere")
    question = ["Someone here asked us of a tent."]
    one, other = (open_replies(place).answer(question)[0] for place in (run, tmp_path / "elsewhere" / written.stem))
    assert one == other and one.reply == THINGS["a tent"]


def test_conversations_are_past_pairs_too(tmp_path: Path, plait: Plait) -> None:
    """Each user's message and the reply to it; what nobody answered must not be answered."""
    lines = []
    for number, (thing, reply) in enumerate(THINGS.items()):
        for frame in FRAMES[:3]:
            turns = [("user", frame.format(x=thing)), ("assistant", reply), ("user", NEVER[number])]
            lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    assert plait("prepare", tmp_path / "chats.jsonl", "-o", tmp_path / "data", "--workers", 0) == 0
    replies = Replies(Dataset.open(tmp_path / "data"))
    assert sorted(set(replies.replies)) == sorted(THINGS.values()) and len(replies.questions) == 15
    assert sorted(set(replies.never)) == sorted(NEVER[: len(THINGS)])
    replies.fit()
    assert replies.answer(["Now tell me: what about my parcel?"])[0].sources[0].reply == THINGS["my parcel"]
