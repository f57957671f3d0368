"""The routes of decisions: typed questions about one input, answered by probabilities.

`/v1/decisions` is OpenAI's (as openai-python 3.54 has it, October 2026), `/v1/systemone` System One's (as transformers
5.23 serves it). Both ask the same engine; what only ours knows stands under `plait` in each answer.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from plait.inference.decisions import Decision, Option, Question, decide
from plait.modalities.media import MEDIA, sniff
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import make_router, service_of
from plait.server.limits import ApiError, decode_base64
from plait.server.service import Served, Service

router = make_router()

Described = Annotated[str, Field(max_length=4096)]


class JsonPart(s.Inner):
    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]


class DecisionMessage(s.Inner):
    """A message, or a tool's call or output, whose text is evidence."""

    content: s.Text | Annotated[list[s.Part | JsonPart], Field(max_length=256)] | None = None
    arguments: s.Text | None = None
    input: s.Text | None = None
    output: s.Text | Annotated[list[s.Part], Field(max_length=256)] | None = None


class Choice(s.Inner):
    value: Annotated[str, Field(max_length=1024)] | bool
    description: Described = ""


class Level(s.Inner):
    label: Annotated[str, Field(max_length=1024)]
    description: Described = ""


class DecisionQuestion(s.Inner):
    type: Literal["predicate", "choice", "score"]
    instructions: Described | Annotated[list[s.TextPart | JsonPart], Field(max_length=64)]
    name: Annotated[str, Field(max_length=256)] | None = None
    choices: Annotated[list[Choice], Field(min_length=2, max_length=255)] | None = None
    levels: Annotated[list[Level], Field(min_length=2, max_length=255)] | None = None


class DecisionRequest(s.Body):
    input: s.Text | Annotated[list[DecisionMessage], Field(min_length=1, max_length=256)]
    questions: Annotated[list[DecisionQuestion], Field(min_length=1, max_length=400)]


class SystemOneQuestion(s.Inner):
    type: Literal["noul", "choice", "score"]
    instructions: Any = ""
    criteria: dict[str, Any] | list[Any] | None = None


class Asset(s.Inner):
    data_base64: str


class SystemOneRequest(s.Body):
    state: str | dict[str, Any] | list[Any]
    questions: Annotated[dict[s.Name, SystemOneQuestion], Field(min_length=1, max_length=64)]
    assets: Annotated[dict[s.Name, Asset], Field(max_length=8, default_factory=dict)]


class Decisions(BaseModel):
    model: str
    answers: list[dict[str, Any]]
    usage: dict[str, Any]


class SystemOneAnswers(BaseModel):
    model: str
    answers: dict[str, dict[str, Any]]
    usage: dict[str, Any]


@router.post("/v1/decisions", response_model=Decisions, tags=["read"])
async def decisions(request: Request, body: DecisionRequest) -> Response:
    """Is it so, which of these, how much on a scale: each with probabilities, or a refusal of that question alone."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    questions = [_question(entry, number) for number, entry in enumerate(body.questions)]
    values = await _values(service, served, body.input, request_context)
    decided = await _decided(service, served, values, questions, request_context)
    answers = [_answer(decision, entry) for decision, entry in zip(decided, body.questions, strict=True)]
    usage = {
        "input_tokens": request_context.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": request_context.prompt_tokens,
    }
    return JSONResponse({"model": served.name, "answers": answers, "usage": usage})


@router.post("/v1/systemone", response_model=SystemOneAnswers, tags=["read"])
async def systemone(request: Request, body: SystemOneRequest) -> Response:
    """The same, in System One's shape: `noul` is yes or no, and questions and answers go by name."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    questions = [_of_systemone(name, entry) for name, entry in body.questions.items()]
    values = await _state(service, served, body, request_context)
    decided = await _decided(service, served, values, questions, request_context)
    answers = {decision.question.name: _systemone_answer(decision) for decision in decided}
    usage = {"input_tokens": request_context.prompt_tokens, "output_tokens": 0}
    return JSONResponse({"model": served.name, "answers": answers, "usage": usage})


async def _decided(
    service: Service, served: Served, values: list[Any], questions: list[Question], request_context: RequestContext
) -> list[Decision]:
    if not values:
        raise ApiError(400, "The input is empty. Give it text, an image or an audio clip.", "input")
    value = values[0] if len(values) == 1 else values
    model = served.model
    decided: list[Decision] = await served.worker.call(
        lambda: decide(model, value, questions), service.deadline(request_context)
    )
    return decided


# --- OpenAI's shape ---------------------------------------------------------------------------------------------


def _question(entry: DecisionQuestion, number: int) -> Question:
    instructions = entry.instructions
    if not isinstance(instructions, str):
        instructions = "\n".join(
            part.text if isinstance(part, s.TextPart) else _json(part.data) for part in instructions
        )
    options: list[Option] = []
    if entry.type == "choice":
        options = [Option(_spelt(one.value), one.description) for one in entry.choices or []]
    elif entry.type == "score":
        options = [Option(one.label, one.description) for one in entry.levels or []]
    if entry.type != "predicate" and not options:
        field = "choices" if entry.type == "choice" else "levels"
        raise ApiError(400, f"A {entry.type} needs {field}.", f"questions.{number}.{field}")
    if len({option.value for option in options}) < len(options):
        raise ApiError(400, "Two options are the same.", f"questions.{number}")
    return Question(entry.type, instructions, tuple(options), entry.name)


async def _values(
    service: Service, served: Served, input_parts: str | list[DecisionMessage], request_context: RequestContext
) -> list[Any]:
    """The input as the model takes it: texts that follow each other are one."""
    if isinstance(input_parts, str):
        parts: list[Any] = [input_parts]
    else:
        parts = []
        for message in input_parts:
            for content in (message.content, message.arguments, message.input, message.output):
                parts += [content] if isinstance(content, str) else content or []
    flat = [s.TextPart(type="text", text=_json(p.data)) if isinstance(p, JsonPart) else p for p in parts]
    served.check_prompt(flat, "input")
    return _joined(await service.parts(served.model, flat, "input", service.deadline(request_context)))


def _joined(values: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for value in values:
        if isinstance(value, str) and joined and isinstance(joined[-1], str):
            joined[-1] += f"\n{value}"
        elif value != "":
            joined.append(value)
    return joined


def _answer(decision: Decision, entry: DecisionQuestion) -> dict[str, Any]:
    common = {"name": decision.question.name, "plait": _ours(decision)}
    if decision.refusal:
        return {"type": "refusal", **common}
    chances = decision.probabilities
    if entry.type == "predicate":
        return {"type": "predicate", "probability": chances[0], **common}
    if entry.type == "choice":
        values = [one.value for one in entry.choices or []]
        listed: list[dict[str, Any]] = [
            {"value": value, "probability": chance} for value, chance in zip(values, chances, strict=True)
        ]
        return {"type": "choice", "choice": values[decision.best], "confidence": decision.confidence,
                "probabilities": listed, **common}  # fmt: skip
    levels = [
        {"value": place, "label": option.value, "probability": chance}
        for place, (option, chance) in enumerate(zip(decision.question.options, chances, strict=True))
    ]
    return {"type": "score", "score": decision.expected, "confidence": decision.confidence, "probabilities": levels,
            **common}  # fmt: skip


def _ours(decision: Decision) -> dict[str, Any]:
    """What only ours says of an answer."""
    return {"calibrated": decision.calibrated, "column": decision.column, "ood_score": decision.ood_score,
            "reason": decision.refusal or None}  # fmt: skip


# --- System One's shape -----------------------------------------------------------------------------------------


def _of_systemone(name: str, entry: SystemOneQuestion) -> Question:
    criteria = entry.criteria or {}
    if entry.type == "noul":
        return Question("predicate", _text(entry.instructions), (), name)
    if entry.type == "choice" and isinstance(criteria, dict) and criteria:
        options = [Option(key, _text(value) if value is not None else "") for key, value in criteria.items()]
        return Question("choice", _text(entry.instructions), tuple(options), name)
    if entry.type == "score" and isinstance(criteria, list) and criteria:
        return Question("score", _text(entry.instructions), tuple(Option(_text(level)) for level in criteria), name)
    criteria_form = "a map of options" if entry.type == "choice" else "a list of levels"
    raise ApiError(400, f"A {entry.type} needs criteria: {criteria_form}.", f"questions.{name[:64]}.criteria")


async def _state(
    service: Service, served: Served, body: SystemOneRequest, request_context: RequestContext
) -> list[Any]:
    """The state as the model takes it, with each asset in the place where its name stands."""
    text = _text(body.state)
    pieces: list[str] = [text]
    if body.assets:
        names = "|".join(re.escape(name) for name in sorted(body.assets, key=len, reverse=True))
        pieces = re.split(f"({names})", text)
    service.check_parts(pieces)
    if len(pieces) > 2 * service.limits.media_parts + 1:
        raise ApiError(400, f"More than {service.limits.media_parts} assets are named. Send fewer.", "assets")
    served.check_prompt([piece for piece in pieces if piece not in body.assets], "state")
    values = []
    for piece in pieces:
        if piece not in body.assets:
            values.append(piece.strip() if body.assets else piece)
            continue
        param = f"assets.{piece[:64]}"
        data = decode_base64(body.assets[piece].data_base64, service.limits, param)
        kind = (sniff(data[:64]) or ("",))[0]
        if kind not in MEDIA:
            raise ApiError(400, "The asset is no image and no audio clip that is read.", param)
        values.append(await service.reader.read(served.model, kind, data, param, service.deadline(request_context)))
    return _joined(values)


def _systemone_answer(decision: Decision) -> dict[str, Any]:
    common = {"plait": _ours(decision)}
    if decision.refusal:
        return {"type": "refusal", **common}
    options, chances = decision.question.options, decision.probabilities
    if decision.question.kind == "predicate":
        return {"type": "noul", "noul": chances[0], **common}
    if decision.question.kind == "choice":
        return {"type": "choice", "choice": options[decision.best].value, "confidence": decision.confidence,
                "probabilities": {o.value: c for o, c in zip(options, chances, strict=True)}, **common}  # fmt: skip
    return {"type": "score", "score": decision.expected, "confidence": decision.confidence,
            "legend": {str(place): option.value for place, option in enumerate(options)},
            "probabilities": {str(place): chance for place, chance in enumerate(chances)}, **common}  # fmt: skip


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _spelt(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value
