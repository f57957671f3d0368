"""Explaining an answer of a model, whoever computes it; what `Model.explain` calls."""

from __future__ import annotations

from typing import Any

from plait.core.errors import PlaitError
from plait.explain import hf_models, plait_models
from plait.explain.methods import Explanation, explain
from plait.hf.pretrained import Pretrained
from plait.inference.base import Model


def explain_answer(
    model: Model,
    value: Any,
    answer: Any = None,
    *,
    to: str = "text",
    column: str | None = None,
    labels: list[str] | None = None,
    template: str | None = None,
    method: str = "occlusion",
    steps: int | None = None,
    seed: int = 0,
) -> Explanation:
    """How much each part of an input moved an answer; arguments are those of `Model.explain`.

    Raises PlaitError for an answer that the model cannot give, or a method that means nothing for it.
    """
    if (plait_model := model.plait_model) is not None:
        if template is not None:
            raise PlaitError(f"{model.name} compares no images with sentences. Leave the template out.")
        question = plait_models.question(plait_model, value, answer, to, column, labels, seed, method == "occlusion")
    else:
        if column is not None or to != "text":
            raise PlaitError(f"{model.name} has no columns and makes no media. Leave out to and column.")
        if isinstance(value, list):
            raise PlaitError(f"{model.name} reads one input at a time. Give one.")
        if not isinstance(model, Pretrained):  # a head, or two joined encoders
            raise PlaitError(f"{model.name} stands on frozen encoders; what moves its answers is not explained yet.")
        question = hf_models.question(model, value, answer, labels, template)
    explanation = explain(question, method, steps, seed)
    if isinstance(question, plait_models.ClassifierQuestion) and question.none_of_these:
        explanation.warnings.insert(
            0, "classify calls this input none of these: it is unlike all that was learnt. What is explained is "
            f"{explanation.answer}{', the nearest label' * (answer is None)}.",
        )  # fmt: skip
    return explanation
