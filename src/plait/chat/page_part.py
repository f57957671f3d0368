"""Auto-reply on the studio's Use page: questions in, quoted past replies out, or silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.chat.replies import answers_by_quoting, open_replies
from plait.core.config import parse_recipe
from plait.core.files import read_json
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.server.page_parts import LinesPart, SnippetCall
from plait.training.tasks import QUESTIONS

EXAMPLES = 4  # questions that are offered
SILENCE = "—"  # what the page shows where no past reply fits


def quotes(run: Path) -> bool:
    """Whether a run answers questions by past replies."""
    facts = read_json(run / "run.json")
    return answers_by_quoting(parse_recipe(facts["recipe"], str(run)), Dataset.open(read_place(facts["dataset"], run)))


def _applies(model: Any, run: Path) -> bool:
    return quotes(run)


def _answers(model: Any, run: Path, data: Path, lines: list[str]) -> list[str]:
    answers = open_replies(run, data, None, None).answer(lines)
    return [f"{line} → {one.reply or SILENCE} · {one.confidence:.0%}" for line, one in zip(lines, answers, strict=True)]


def _questions(model: Any, run: Path, data: Path) -> list[str]:
    """Questions of the data that training did not see, the shortest first."""
    dataset = Dataset.open(data)
    column = next((name for name in dataset.columns if name.lower() in QUESTIONS), None)
    split = "test" if dataset.manifest.counts.get("test") else "val"
    if column is None or not (texts := dataset.texts(column)):
        return []
    held_out = {text for index in dataset.indices(split)[:200] if (text := texts[int(index)])}
    return sorted(held_out, key=lambda text: (len(text), text))[:EXAMPLES]


REPLY = LinesPart(
    name="reply",
    applies=_applies,
    title={"en": "Answer questions", "zh": "回答问题"},
    question={
        "en": "Questions, one a line. It stays silent where no past reply fits.",
        "zh": "问题，每行一个。没有合适的回复时保持沉默。",
    },
    answer=_answers,
    examples=_questions,
)

SNIPPET = SnippetCall(
    "reply", 'plait.open_replies(run).answer(["When are you open?"])', "/v1/plait/reply",
    {"messages": ["When are you open?"]}, applies=quotes,
)  # fmt: skip
