"""Auto-reply, measured and told: past questions asked without their own pair."""

from __future__ import annotations

import math
from pathlib import Path

from plait.chat.replies import LeftOut, Replies, answers_by_quoting, are_pairs, open_replies
from plait.core.config import Recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.data.dataset import Dataset
from plait.evaluation.context import EvalContext
from plait.evaluation.keys import Direction
from plait.evaluation.outcome import Outcome

TASK = "reply"
ADVICE = 'ask it: plait reply RUN "a question"; a text encoder (--encoder) knows other words, and more phrasings help.'


def evaluate_replies(eval_context: EvalContext) -> None:
    """How many past questions are answered right where their own pair is left out, and how many that nothing else
    answers meet silence. For data of questions and replies alone, and for runs that were made to reply."""
    dataset = eval_context.dataset
    if not (are_pairs(dataset) or _was_made_to_reply(eval_context.model.folder)):
        return
    try:
        replies = Replies(dataset)
    except PlaitError:  # too few pairs, which `plait reply` says
        return
    replies.fit()
    left_out, direction = replies.measure(), Direction(replies.question, replies.reply)
    outcomes = []
    for name, figure, count, n in (
        ("right", "answered right", left_out.right, left_out.answerable),
        ("wrong", "answered wrong", left_out.wrong, left_out.answerable),
        ("silent", "of what nothing answers met with silence", left_out.silent, left_out.unanswerable),
    ):
        if not n:
            continue
        share = count / n
        error = math.sqrt(share * (1 - share) / n)
        eval_context.keep(TASK, direction, name, share, stderr=error, n=n)
        subject = "questions of the past, each without its own pair"
        outcomes.append(Outcome(TASK, subject, figure, share, error, n, unit="questions", advice=ADVICE))
    eval_context.findings.outcomes[:0] = outcomes


def _was_made_to_reply(checkpoint: Path | None) -> bool:
    """Whether the run of a checkpoint was trained with --task reply."""
    run = checkpoint.resolve().parent.parent if checkpoint is not None else None
    facts = run / "run.json" if run is not None else None
    return facts is not None and facts.is_file() and read_json(facts)["recipe"]["training"]["task"] == "reply"


def describe_replies(run: Path, dataset: Dataset, recipe: Recipe) -> list[str] | None:
    """What a run that answers questions can do, as its training ends; None for other runs."""
    if not answers_by_quoting(recipe, dataset):
        return None
    try:
        replies = open_replies(run, Path(str(dataset.path)), None, None)
    except PlaitError as error:
        return [str(error)]
    said = _in_words(replies.measure(), len(replies.questions))
    writes = f"plait chat {run}" if replies.question == replies.reply else "--compose"
    return [
        f"{said} It quotes; the network that was trained writes with {writes} alone.",
        f'Ask it: plait reply {run} "a question"',
    ]


def _in_words(found: LeftOut, pairs: int) -> str:
    """What was answered, as a sentence or two."""
    parts = [f"Answers come from {pairs:,} past pairs, by the nearest question."]
    if found.answerable:
        silent = found.answerable - found.right - found.wrong
        parts.append(
            f"Of {found.answerable:,} questions whose own pair was left out {found.right / found.answerable:.0%} were "
            f"answered right, {found.wrong / found.answerable:.0%} wrong, {silent / found.answerable:.0%} with silence."
        )
    if found.unanswerable:
        parts.append(
            f"Of {found.unanswerable:,} that no other pair answers {found.silent / found.unanswerable:.0%} met "
            "silence, as they should."
        )
    return " ".join(parts)
