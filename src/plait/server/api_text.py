"""The routes that write text: chat and completions."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from plait.inference.base import Verb
from plait.inference.model import PlaitModel
from plait.inference.prompts import Prompt, Turn
from plait.inference.requests import Completion
from plait.inference.requests import Request as EngineRequest
from plait.inference.scoring import PromptScores, prompt_scores
from plait.inference.tools import CallPiece, TextPiece, ToolCall
from plait.modalities.media import MEDIA, written_by
from plait.model.multimodal import Sequence
from plait.server import answers as a
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import (
    STREAM,
    check_ids,
    clamp_max_tokens,
    constraint_of,
    engine_request_of,
    finish_of,
    make_router,
    service_of,
    stops,
    text_column,
    usage_of,
    voice_of,
)
from plait.server.limits import ApiError
from plait.server.logprobs import Aligner, Token, of_chat, of_text
from plait.server.media import audio, png
from plait.server.service import EventStream, Lead, Served, Service, note, read
from plait.server.tools import ReplyReader, ToolUse, calls_of, tool_use
from plait.server.worker import PendingRequest, follow

router = make_router()

# --- chat -------------------------------------------------------------------------------------------------------


@router.post(
    "/v1/chat/completions", response_model=a.ChatCompletion, responses={200: {"content": STREAM}}, tags=["text"]
)
async def chat_completions(request: Request, body: s.ChatRequest) -> Response:
    """The next reply of a conversation: text, and with `modalities` images and audio clips, each written after the same
    messages. Images come in `images`, as data: URLs; audio clips in `audio`, of one reply the first."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model, chat, n = served.writer, served.chat, body.n or 1
    if chat is None:
        raise ApiError(400, f"{served.name} has no chat.", "model")
    if served.answerer is not None:
        return await _quoted(service, served, request_context, body)
    use = tool_use(service, served, request_context, body.tools, body.tool_choice, body.parallel_tool_calls)
    turns = await chat_turns(service, served, body.messages, service.deadline(request_context))
    size = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
    max_tokens = clamp_max_tokens(
        model, body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    )
    outputs = list(dict.fromkeys(body.modalities or ["text"]))
    if body.logprobs and outputs != ["text"]:
        raise ApiError(400, "logprobs go with text alone. Leave them out, or the other modalities.", "logprobs")
    constraint = await constraint_of(service, served, body, use, n)
    parts: list[ReplyPart] = []

    def prepare() -> None:
        for kind in outputs:
            column = _column(service, request_context, model, body, kind)
            prompt = chat.prompt(turns, column, use.tools if use and kind == "text" else ())
            stop = (*stops(body.stop), *prompt.stop) if kind == "text" else ()
            text_limit = max_tokens if kind == "text" else None
            engine_request = engine_request_of(model, prompt.context, column, body, n, max_tokens=text_limit, stop=stop)
            engine_request = replace(
                engine_request,
                logprobs=bool(body.logprobs),
                top_logprobs=body.top_logprobs or 0 if body.logprobs else 0,
                constraint=constraint if kind == "text" else None,
            )
            parts.append(ReplyPart(kind, column, prompt, engine_request))

    await service.prepared(prepare, size)
    form = body.audio.format if body.audio else "wav"
    head = _head("chatcmpl-", "chat.completion.chunk" if body.stream else "chat.completion", served)
    if body.stream:
        pending_requests = served.worker.submit([part.wanted for part in parts], service.deadline(request_context))
        usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _chat_events(service, served, request_context, pending_requests, head, parts, form, usage, use)
        return EventStream(events, pending_requests)
    choices = await _choices(service, served, request_context, parts, form, use, n)
    read_ = sum(len(part.prompt.context) for part in parts)
    return JSONResponse({**head, "choices": choices, "usage": usage_of(read_, request_context.completion_tokens)})


@dataclass(frozen=True)
class ReplyPart:
    """One of the kinds that a reply is written in.

    Attributes:
        kind: "text", or a medium.
        column: What is written; None for the text of a model without columns.
        prompt: The messages before it.
        wanted: What the engine is asked for.
    """

    kind: str
    column: str | None
    prompt: Prompt
    wanted: EngineRequest


SILENCE = "Nothing in the past answers that."  # the refusal of a run that quotes past replies


async def _quoted(service: Service, served: Served, request_context: RequestContext, body: s.ChatRequest) -> Response:
    """The past reply that answers the last message; where none does, a refusal, and no content."""
    deadline = service.deadline(request_context)
    turns = await chat_turns(service, served, body.messages, deadline)
    message = " ".join(part for part in turns[-1].parts if isinstance(part, str)) if turns else ""
    answerer = served.answerer
    assert answerer is not None
    quoted: str | None = await served.worker.call(lambda: answerer(message), deadline)
    said = {"content": quoted, "refusal": SILENCE if quoted is None else None}
    request_context.prompt_tokens = len(message.split())
    n, head = body.n or 1, _head("chatcmpl-", "chat.completion.chunk" if body.stream else "chat.completion", served)
    usage = usage_of(request_context.prompt_tokens, len((quoted or "").split()))
    end: dict[str, Any] = {"logprobs": None, "finish_reason": "stop"}
    if not body.stream:
        choices = [{"index": i, "message": {"role": "assistant", **said}, **end} for i in range(n)]
        return JSONResponse({**head, "choices": choices, "usage": usage})

    async def events() -> AsyncIterator[list[Any]]:
        for delta, finish in (({"role": "assistant", **said}, None), ({}, "stop")):
            yield [
                {**head, "choices": [{"index": i, "delta": delta, "logprobs": None, "finish_reason": finish}]}
                for i in range(n)
            ]
        if body.stream_options and body.stream_options.include_usage:
            yield [{**head, "choices": [], "usage": usage}]

    return EventStream(events(), [])


def _column(
    service: Service, request_context: RequestContext, model: PlaitModel, body: s.ChatRequest, kind: str
) -> str | None:
    """The column in which a kind is written. Raises ApiError where the model writes none."""
    if kind == "text":
        return text_column(model, body.column)
    if kind in written_by(Verb.SPEAK):
        return voice_of(service, request_context, model, body.audio.voice if body.audio else None)
    return model.column(None, kind, f"write {kind}")


async def _choices(
    service: Service, served: Served, request_context: RequestContext, parts: list[ReplyPart], form: str,
    use: ToolUse | None, n: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """`n` whole replies, each with all its parts."""
    choices: list[dict[str, Any]] = [
        {"index": i, "message": {"role": "assistant", "content": None, "refusal": None}, "logprobs": None,
         "finish_reason": "stop"} for i in range(n)
    ]  # fmt: skip
    results = await service.written(served, [part.wanted for part in parts], request_context)
    for part, samples in zip(parts, results, strict=True):
        if part.kind != "text":
            media = await service.rendered(served, str(part.column), samples, request_context)
            for choice, value in zip(choices, media, strict=True):
                choice["message"] |= await asyncio.to_thread(OUTPUTS[MEDIA[part.kind].writes], value, form)
            continue
        context = part.prompt.context
        for choice, sample in zip(choices, samples, strict=True):
            reader = ReplyReader(use, Lead(part.prompt.strip))
            reader.add(sample.text or "", last=True)
            choice["message"]["content"] = reader.text if reader.text or not reader.calls else None
            if reader.calls:
                choice["message"]["tool_calls"] = [_call(call) for call in reader.calls]
            choice["finish_reason"] = reader.finish(sample.finish)
            if sample.logprobs is not None:
                aligner = Aligner(served.engine_model.checkpoint.text, [] if context.media else context.ids)
                choice["logprobs"] = of_chat(aligner.add(sample.ids, sample.logprobs, sample.top, last=True))
    return choices


async def chat_turns(service: Service, served: Served, messages: list[s.Message], deadline: float) -> list[Turn]:
    """Messages as turns, their media decoded. Raises ApiError for an empty one, and where there is too much."""
    parts_by_message: list[list[Any]] = []
    for message in messages:
        parts: list[Any] = [message.content] if isinstance(message.content, str) else list(message.content or [])
        parts += message.images or []
        if not parts and message.role == "tool":
            parts = [""]
        if not parts and message.role != "assistant":
            raise ApiError(
                400, f"The {message.role} message is empty. Give it content.", f"messages.{len(parts_by_message)}"
            )
        parts_by_message.append(parts)
    texts = [part for parts in parts_by_message for part in parts]
    texts += [call.function.arguments for message in messages for call in message.tool_calls or []]
    service.check_parts(texts)
    served.check_prompt(texts, "messages")
    return [
        Turn(
            message.role,
            await service.parts(served.model, parts, f"messages.{i}.content", deadline),
            calls_of(message),
            message.tool_call_id or "",
        )
        for i, (message, parts) in enumerate(zip(messages, parts_by_message, strict=True))
        if parts or message.tool_calls  # clients send replies that were cut before their first word
    ]


async def text_reply(
    service: Service, served: Served, request_context: RequestContext, turns: list[Turn], body: s.SamplingBody,
    form: s.Writing, use: ToolUse | None, max_tokens: int | None, stop: tuple[str, ...] = (),
) -> tuple[Prompt, EngineRequest]:  # fmt: skip
    """The engine's request for one reply in text, and its prompt; `form` says what the text must be."""
    model, chat = served.writer, served.chat
    if chat is None:
        raise ApiError(400, f"{served.name} has no chat.", "model")
    if served.answerer is not None:
        raise ApiError(
            400, f"{served.name} answers from past replies: ask /v1/chat/completions, or /v1/plait/reply.", "model"
        )
    constraint = await constraint_of(service, served, form, use)

    def prepare() -> tuple[Prompt, EngineRequest]:
        column = text_column(model, None)
        prompt = chat.prompt(turns, column, use.tools if use else ())
        engine_request = engine_request_of(
            model,
            prompt.context,
            column,
            body,
            1,
            max_tokens=clamp_max_tokens(model, max_tokens),
            stop=(*stop, *prompt.stop),
        )
        return prompt, replace(engine_request, constraint=constraint)

    size = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
    return await service.prepared(prepare, size)


def _head(prefix: str, kind: str, served: Served) -> dict[str, Any]:
    return {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": served.name,
            "system_fingerprint": served.fingerprint}  # fmt: skip


def _call(call: ToolCall) -> dict[str, Any]:
    """A call as a message holds it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(piece: CallPiece, reader: ReplyReader) -> dict[str, Any]:
    """A piece of a call as a stream has it: id and name come first, then the arguments."""
    if piece.name is None:
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
    call = reader.calls[piece.index]
    return {"tool_calls": [{"index": piece.index, **_call(ToolCall(call.name, "", call.id))}]}


def _drawn(image: Any, form: str) -> dict[str, Any]:
    """An image as a message holds it."""
    url = f"data:image/png;base64,{png(image)}"
    return {"images": [{"type": "image_url", "image_url": {"url": url, "detail": None}}]}


def _spoken(clip: Any, form: str) -> dict[str, Any]:
    """An audio clip as a message holds it, in the format asked for."""
    wave, rate = clip
    data = base64.b64encode(audio(wave, rate, form)).decode()
    # OpenAI keeps audio clips for later turns; here the client sends them again.
    return {"audio": {"id": "audio-" + secrets.token_hex(8), "data": data, "expires_at": int(time.time()),
                      "transcript": ""}}  # fmt: skip


# How a message holds what a command made.
OUTPUTS: dict[str, Callable[[Any, str], dict[str, Any]]] = {Verb.DRAW: _drawn, Verb.SPEAK: _spoken}


async def _chat_events(
    service: Service, served: Served, request_context: RequestContext, pending_requests: list[PendingRequest],
    head: dict[str, Any], parts: list[ReplyPart], form: str, usage: bool, use: ToolUse | None,
) -> AsyncIterator[list[Any]]:  # fmt: skip
    """The chunks of a reply, as its parts are written."""
    more = {"usage": None} if usage else {}

    def chunk(i: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **more}

    n, outputs = pending_requests[0].request.n, [part.kind for part in parts]
    before = parts[0].prompt.context
    aligners = [Aligner(served.engine_model.checkpoint.text, [] if before.media else before.ids) for _ in range(n)]
    readers = [ReplyReader(use, Lead(parts[0].prompt.strip)) for _ in range(n)]
    ends = ["stop"] * n
    yield [chunk(i, {"role": "assistant", "content": "" if "text" in outputs else None}) for i in range(n)]
    async for updates in follow(pending_requests):
        note(request_context, updates)
        events = []
        for k, update in updates:
            if outputs[k] != "text":
                continue
            i, reader = update.sample, readers[update.sample]
            pieces = reader.add(update.text, update.finish is not None)
            text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
            if update.finish:
                ends[i] = reader.finish(update.finish)
            logprobs = None
            if pending_requests[k].request.logprobs and update.ids:
                tokens = aligners[i].add(update.ids, update.logprobs, update.top, update.finish is not None)
                logprobs = of_chat(tokens)
            if text or logprobs:
                events.append(chunk(i, {"content": text}, None, logprobs))
            calls = [piece for piece in pieces if isinstance(piece, CallPiece) and (piece.name or piece.arguments)]
            events += [chunk(i, _call_delta(piece, reader)) for piece in calls]
            if update.finish and len(outputs) == 1:
                events.append(chunk(i, {}, ends[i]))
        if events:
            yield events
    read(request_context, pending_requests)
    for part, pending in zip(parts, pending_requests, strict=True):
        if part.kind != "text":
            media = await service.rendered(served, str(part.column), pending.result.samples, request_context)
            for i, value in enumerate(media):
                yield [chunk(i, await asyncio.to_thread(OUTPUTS[MEDIA[part.kind].writes], value, form))]
    if outputs != ["text"]:
        yield [chunk(i, {}, ends[i]) for i in range(n)]
    if usage:
        yield [
            {**head, "choices": [], "usage": usage_of(request_context.prompt_tokens, request_context.completion_tokens)}
        ]


async def streamed_pieces(
    reader: ReplyReader, pending: list[PendingRequest], request_context: RequestContext
) -> AsyncIterator[tuple[list[TextPiece | CallPiece], str | None]]:
    """What each step of the engine adds to a reply: its pieces, and once it is over how it ended."""
    async for updates in follow(pending):
        note(request_context, updates)
        pieces: list[TextPiece | CallPiece] = []
        finish = None
        for _, update in updates:
            finish = update.finish or finish
            pieces += reader.add(update.text, update.finish is not None)
        yield pieces, finish
    read(request_context, pending)


class StreamedReply(ABC):
    """A reply on its way, in the events of one protocol."""

    reader: ReplyReader

    @abstractmethod
    def opening(self, pending: list[PendingRequest]) -> list[Any]:
        """The events before the first piece."""

    @abstractmethod
    def piece_events(self, piece: TextPiece | CallPiece) -> list[Any]:
        """The events of one piece of the reply."""

    @abstractmethod
    def closing(self, finish: str, request_context: RequestContext) -> list[Any]:
        """The events after the last piece; `finish` says how the reply ended."""

    async def events(self, pending: list[PendingRequest], request_context: RequestContext) -> AsyncIterator[list[Any]]:
        """All events, as the engine writes."""
        yield self.opening(pending)
        finish = "stop"
        async for pieces, end in streamed_pieces(self.reader, pending, request_context):
            finish = end or finish
            if events := [event for piece in pieces for event in self.piece_events(piece)]:
                yield events
        yield self.closing(finish, request_context)


# --- completions ------------------------------------------------------------------------------------------------


def _text_choices(
    model: PlaitModel, results: list[list[Completion]], before: list[str], shown: list[_Shown] | None
) -> list[dict[str, Any]]:
    """The choices of completions: `before` is the text in front of each prompt's, `shown` its log-probabilities."""
    choices: list[dict[str, Any]] = []
    for i, samples in enumerate(results):
        for sample in samples:
            logprobs = None if shown is None else shown[i].of(model, sample, len(before[i]))
            choices.append({
                "index": len(choices), "text": before[i] + (sample.text or ""), "logprobs": logprobs,
                "finish_reason": finish_of(sample.finish),
            })  # fmt: skip
    return choices


@router.post("/v1/completions", response_model=a.Completion, responses={200: {"content": STREAM}}, tags=["text"])
async def completions(request: Request, body: s.CompletionRequest) -> Response:
    """What follows a text, or each of up to 16."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model, n = served.writer, body.n or 1
    prompts = _prompts(body.prompt)
    service.check_parts(prompt for prompt in prompts if isinstance(prompt, str))
    for prompt in prompts:
        served.check_prompt([prompt], "prompt")
    max_tokens = 16 if body.max_tokens is None else clamp_max_tokens(model, body.max_tokens) if body.max_tokens else 0
    constraint = await constraint_of(service, served, body, samples=n * len(prompts))
    deadline = service.deadline(request_context)
    engine_requests: list[EngineRequest] = []

    def prepare() -> None:
        for i, prompt in enumerate(prompts):
            context = _context(model, prompt)
            if body.column is not None:
                model.column(body.column, "text", "write text")
            engine_request = engine_request_of(
                model, context, body.column, body, n, i * n, max_tokens, stops(body.stop)
            )
            engine_requests.append(
                replace(
                    engine_request,
                    logprobs=body.logprobs is not None,
                    top_logprobs=body.logprobs or 0,
                    constraint=constraint,
                )
            )

    await service.prepared(prepare, sum(len(prompt) for prompt in prompts))
    shown = [_Shown(one.context, body.logprobs) for one in engine_requests]
    if body.echo and body.logprobs is not None:
        contexts = [one.context for one in engine_requests]
        top = body.logprobs
        scores = await served.worker.call(lambda: prompt_scores(model.engine, contexts, top), deadline)
        for one, prompt, score in zip(shown, prompts, scores, strict=True):
            one.echo(model, prompt, score)
    before = [model.checkpoint.text.decode(p) if isinstance(p, list) else p for p in prompts]
    before = before if body.echo else [""] * len(prompts)
    head = _head("cmpl-", "text_completion", served)
    if body.stream and max_tokens:
        pending_requests = served.worker.submit(engine_requests, deadline)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(
            _text_events(model, request_context, pending_requests, head, before, shown, usage), pending_requests
        )
    if max_tokens:
        results = await service.written(served, engine_requests, request_context)
    else:
        results = [[Completion([], "length", "", [], [])] * n for _ in engine_requests]
    choices = _text_choices(model, results, before, shown if body.logprobs is not None else None)
    prompt_tokens = sum(len(one.context) for one in engine_requests)
    return JSONResponse(
        {**head, "choices": choices, "usage": usage_of(prompt_tokens, request_context.completion_tokens)}
    )


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _context(model: PlaitModel, prompt: str | list[int]) -> Sequence:
    if isinstance(prompt, list):
        # A text may begin as the model's texts begin: lm-evaluation-harness puts the end of another one first.
        begins = set() if model.columns else {model.vocabulary.end_id, *model.checkpoint.text.start}
        check_ids(model, prompt[1:] if prompt[0] in begins else prompt)
        return Sequence().read_ids(prompt, "text")
    return model.context(prompt) if prompt else model.start()


@dataclass
class _Shown:
    """The log probabilities of one prompt's choices."""

    context: Sequence
    count: int | None  # likeliest tokens a place; None: no log probabilities
    prompt: list[Token] = field(default_factory=list)  # of the prompt, where it is echoed

    def echo(self, model: PlaitModel, prompt: str | list[int], scores: PromptScores) -> None:
        """Take the prompt's own, without what an import puts in front of every text."""
        hidden = 0
        if isinstance(prompt, str):
            hidden = len(model.checkpoint.text.start) if not model.columns and prompt else 0 if prompt else 1
        ids = self.context.ids[hidden:]
        aligner = Aligner(model.checkpoint.text)
        self.prompt = aligner.add(ids, scores.logprobs[hidden:], scores.top[hidden:], last=True)

    def aligner(self, model: PlaitModel, offset: int) -> Aligner:
        """What follows the tokens of one sample."""
        return Aligner(model.checkpoint.text, [] if self.context.media else self.context.ids, offset)

    def of(self, model: PlaitModel, sample: Completion, offset: int) -> dict[str, Any]:
        """The log probabilities of a sample; behind an echo also that of its end, if it came to one."""
        ids, logprobs = list(sample.ids), sample.logprobs or []
        tokens = self.aligner(model, offset).add(ids, logprobs, sample.top, last=True)
        if self.prompt and len(logprobs) > len(ids):
            end = Token("", offset + len(sample.text or ""), b"", logprobs[len(ids)])
            tokens.append(end)
        return of_text([*self.prompt, *tokens], self.count or 0)


async def _text_events(
    model: PlaitModel,
    request_context: RequestContext,
    pending_requests: list[PendingRequest],
    head: dict[str, Any],
    before: list[str],
    shown: list[_Shown],
    usage: bool,
) -> AsyncIterator[list[Any]]:
    more = {"usage": None} if usage else {}
    aligners = [
        [one.aligner(model, len(text)) for _ in range(pending.request.n)]
        for one, text, pending in zip(shown, before, pending_requests, strict=True)
    ]

    def chunk(k: int, sample: int, text: str, finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        index = k * pending_requests[k].request.n + sample
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **more}

    if any(before):
        heads = [of_text(one.prompt, one.count or 0) if one.prompt else None for one in shown]
        yield [
            chunk(k, i, before[k], None, heads[k])
            for k, pending in enumerate(pending_requests)
            for i in range(pending.request.n)
        ]
    async for updates in follow(pending_requests):
        note(request_context, updates)
        events = []
        for k, update in updates:
            finish = finish_of(update.finish) if update.finish else None
            logprobs = None
            if pending_requests[k].request.logprobs and update.ids:
                aligner, last = aligners[k][update.sample], update.finish is not None
                logprobs = of_text(aligner.add(update.ids, update.logprobs, update.top, last), shown[k].count or 0)
            if update.text or finish or logprobs:
                events.append(chunk(k, update.sample, update.text, finish, logprobs))
        if events:
            yield events
    read(request_context, pending_requests)
    if usage:
        yield [
            {**head, "choices": [], "usage": usage_of(request_context.prompt_tokens, request_context.completion_tokens)}
        ]


# --- tokens -----------------------------------------------------------------------------------------------------


@router.post("/tokenize", response_model=a.Tokenized, tags=["text"])
async def tokenize(request: Request, body: s.TokenizeRequest) -> Response:
    """The ids of a text."""
    service, request_context = service_of(request)
    model = service.open(body, request_context).engine_model
    text = model.checkpoint.text
    start = text.start if body.add_special_tokens and not model.columns else []
    ids = await service.prepared(lambda: [*start, *text.encode(body.prompt)], len(body.prompt))
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.engine.max_length})


@router.post("/detokenize", response_model=a.Detokenized, tags=["text"])
async def detokenize(request: Request, body: s.DetokenizeRequest) -> Response:
    """The text of ids."""
    service, request_context = service_of(request)
    model = service.open(body, request_context).engine_model

    def work() -> str:
        check_ids(model, body.tokens)
        return model.checkpoint.text.decode(body.tokens)

    return JSONResponse({"prompt": await service.prepared(work, len(body.tokens))})
