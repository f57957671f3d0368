"""Auto-reply over HTTP: past replies quoted with their sources, or silence."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from plait.chat.replies import Replies, answers_by_quoting, open_replies
from plait.core.config import parse_recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.server.api import make_router, service_of
from plait.server.limits import ApiError
from plait.server.schemas import Body, Text
from plait.server.service import Answerer

router = make_router()


class ReplyRequest(Body):
    """Messages to a run that was trained on past questions and their replies."""

    messages: Annotated[list[Text], Field(min_length=1, max_length=64)]
    sources: Annotated[int, Field(ge=0, le=20, description="Past pairs to show beside each answer.")] = 3


class SourcePair(BaseModel):
    question: str
    reply: str
    nearness: float


class ReplyAnswer(BaseModel):
    """`reply` is null for silence."""

    message: str
    reply: str | None
    confidence: float
    threshold: float
    sources: list[SourcePair]
    composed: bool


class ReplyAnswers(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[ReplyAnswer]


class QuotedReplies:
    """The past replies of a run, opened once, which answer a chat's last message."""

    def __init__(self, replies: Replies) -> None:
        self.replies = replies

    def __call__(self, message: str) -> str | None:
        return self.replies.answer([message], sources=0)[0].reply


def answerer_of(run: Path) -> Answerer | None:
    """How a run answers messages: by quoting, where that is its task and its past pairs are at hand."""
    facts = read_json(run / "run.json")
    try:
        dataset = Dataset.open(read_place(facts["dataset"], run))
        if not answers_by_quoting(parse_recipe(facts["recipe"], str(run / "run.json")), dataset):
            return None
        return QuotedReplies(open_replies(run))
    except PlaitError:  # its data are gone: then the network writes
        return None


@router.post("/v1/plait/reply", response_model=ReplyAnswers, tags=["read"])
async def reply(request: Request, body: ReplyRequest) -> Response:
    """Each message answered by a past reply, with the nearest past pairs, or met with silence (`reply` is null)."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    answerer = served.answerer
    if not isinstance(answerer, QuotedReplies):
        raise ApiError(400, f"{served.name} knows no past replies. Train it on questions and their replies.", "model")
    request_context.prompt_tokens = sum(len(message.split()) for message in body.messages)

    def work() -> list[dict[str, Any]]:
        answers = answerer.replies.answer(body.messages, body.sources)
        return [{"message": text, **asdict(one)} for text, one in zip(body.messages, answers, strict=True)]

    data = await served.worker.call(work, service.deadline(request_context))
    return JSONResponse({"object": "list", "model": served.name, "data": data})
