"""The command that answers typed questions with probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, out, plain
from plait.core.errors import PlaitError


@app.command()
def decide(
    model: ModelArgument,
    file: Annotated[str, typer.Argument(help="An image, a recording, or a text.")],
    is_: Annotated[list[str] | None, typer.Option("--is", help="Is it so? Names one label: 'a red bar'.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Which of these, with commas?")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSON: a list of questions as /v1/decisions takes them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answers as JSON.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Answer typed questions about an input with probabilities, or say why not.

    Example: plait decide runs/demo digit.png --is three --choice three,eight
    """
    from plait.inference.decisions import Option, Question, read_questions
    from plait.modalities.inputs import media_or_text

    asked_questions = [Question("predicate", text, (), text) for text in is_ or []]
    for listed in choice or []:
        options = [Option(value.strip()) for value in listed.split(",") if value.strip()]
        asked_questions.append(Question("choice", "", tuple(options), listed))
    if questions is not None:
        try:
            asked_questions += read_questions(json.loads(questions.expanduser().read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PlaitError(f"{questions} cannot be read: {error}.") from None
    if not asked_questions:
        raise PlaitError("Ask something: --is LABEL, --choice A,B or --questions FILE.")
    decisions = plait.load(model, device, precision).decide(media_or_text(file), asked_questions)
    if as_json:
        out.print_json(json.dumps([
            {"name": one.question.name, "type": one.question.kind, "refusal": one.refusal or None,
             "options": [option.value for option in one.question.options], "probabilities": one.probabilities,
             "calibrated": one.calibrated, "column": one.column, "ood_score": one.ood_score} for one in decisions
        ]))  # fmt: skip
        return
    for one in decisions:
        name = one.question.name or one.question.instructions
        names = [option.value for option in one.question.options] or ["yes", "no"]
        pairs = ", ".join(f"{name} {chance:.3f}" for name, chance in zip(names, one.probabilities, strict=False))
        note = "" if one.calibrated or one.refusal else " (not calibrated)"
        out.print(plain(f"{name}: {one.refusal or pairs}{note}"))
