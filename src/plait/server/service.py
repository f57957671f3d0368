"""Between the routes and the models: which model is meant, what a request's parts are, and answers that stream."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from starlette.responses import Response

from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.inference.base import Model
from plait.inference.model import PlaitModel
from plait.inference.prompts import Chat
from plait.inference.requests import Completion, Delta, Request
from plait.model.multimodal import Sequence
from plait.server.access_log import Metrics, RequestContext
from plait.server.limits import ApiError, Limits, as_api_error, decode_base64, decode_data_url
from plait.server.media import Reader
from plait.server.middleware import Scope, Send, answer
from plait.server.schemas import HARMLESS, AudioPart, Body, ImagePart, TextPart
from plait.server.worker import PendingRequest, Worker, follow

T = TypeVar("T")
INLINE = 4000  # characters that are tokenised without leaving the event loop


class Answerer(Protocol):
    """Answers messages by other means than the network's words: by quoting what stands in the past."""

    def __call__(self, message: str) -> str | None:
        """The answer; None for silence."""
        ...


# Run's folder -> how its messages are answered; None for a run that writes its replies itself.
ANSWERERS: ExtensionPoint[Callable[[Path], Answerer | None]] = ExtensionPoint("answerer")


@dataclass
class Served:
    """A model under its name."""

    name: str
    model: Model
    worker: Worker
    fingerprint: str
    created: int
    chat: Chat | None = None
    answerer: Answerer | None = None
    prompt_bytes: int = 0  # more bytes of text than these cannot fit into the model's context; 0: not known

    @classmethod
    def of(cls, name: str, model: Model, folder: Path, fingerprint: str, limits: Limits) -> Served:
        chat = Chat(plait_model, folder) if (plait_model := model.plait_model) is not None else None
        worker = Worker(name, model, limits)
        max_bytes = _most_bytes(plait_model) if plait_model is not None else 0
        run = next((place for place in (folder, *folder.resolve().parents[:2]) if (place / "run.json").is_file()), None)
        answerers = [] if run is None else [found for make in ANSWERERS.all() if (found := make(run)) is not None]
        answerer = answerers[0] if answerers else None
        return cls(name, model, worker, fingerprint, int(time.time()), chat, answerer, prompt_bytes=max_bytes)

    def sharing(self, twin: PlaitModel) -> Served:
        """The same model with an adapter, in the same batch: `twin` shares its weights."""
        twin.engine = self.engine_model.engine
        chat = copy.copy(self.chat)
        if chat is not None:
            chat.model = twin
        return replace(self, name=twin.name, model=twin, chat=chat, answerer=None)  # which quotes for the run alone

    def check_prompt(self, parts: Iterable[Any], param: str) -> None:
        """Raises ApiError for texts that are certainly too long for the model, before they are tokenised."""
        texts = (part.text if isinstance(part, TextPart) else part for part in parts)
        size = sum(len(text.encode()) for text in texts if isinstance(text, str))
        if self.prompt_bytes and size > self.prompt_bytes:
            limit = self.engine_model.engine.max_length
            raise ApiError(
                400, f"The prompt has {size} bytes, which do not fit into this model's {limit} tokens: it has room for "
                f"{limit}. Shorten it.", param, "context_length_exceeded",
            )  # fmt: skip

    @property
    def engine_model(self) -> PlaitModel:
        """The model where it runs in our engine. Raises ApiError where it does not."""
        if (plait_model := self.model.plait_model) is not None:
            return plait_model
        raise ApiError(
            400,
            f"{self.name} runs in transformers and is served for {', '.join(self.verbs)} only. Generation needs a run, "
            "or a GPT-2, Llama or Qwen3 model.",
            "model",
        )

    @property
    def writer(self) -> PlaitModel:
        """The model where it writes texts or media. Raises ApiError where it runs elsewhere, or says labels alone."""
        if (plait_model := self.engine_model).answers_only:
            raise ApiError(
                400, f"{self.name} was trained to say which label an input has, and writes nothing. Ask "
                "/v1/plait/classify.", "model",
            )  # fmt: skip
        return plait_model

    @property
    def verbs(self) -> list[str]:
        """What it is served for."""
        if self.model.plait_model is not None:
            return self.model.offered_verbs
        return [verb for verb in self.model.verbs if verb in ("classify", "embed", "transcribe")]


class Service:
    """All models that are served, and what a handler needs of them for one request."""

    def __init__(
        self,
        models: list[Served],
        limits: Limits,
        metrics: Metrics,
        resources: dict[str, Any] | None = None,
        aliases: dict[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        self.models = {served.name: served for served in models}
        self.aliases = aliases or {}  # further name -> name
        self.strict = strict
        self.resources = resources or {}  # name of a feature -> what it opened
        self.limits, self.metrics = limits, metrics
        self.reader = Reader(limits)

    def open(self, body: Body, request_context: RequestContext) -> Served:
        """The model that a request is for; its fields that have no effect are noted. Raises ApiError for a model that
        is not there, and on a strict server for such fields."""
        for name in body.model_extra or {}:
            self.ignore(name, request_context)
        return self.find(body.model, request_context)

    def ignore(self, field: str, request_context: RequestContext) -> None:
        """Note a field that has no effect. Raises ApiError on a strict server, unless it never changes an answer."""
        if self.strict and field not in HARMLESS:
            raise ApiError(
                400, f"Unknown field '{field[:64]}'. Leave it out; see /openapi.json for those that have an effect.",
                field[:120], "unknown_field",
            )  # fmt: skip
        request_context.ignored.add(field)

    def find(self, name: str | None, request_context: RequestContext) -> Served:
        """The model of a name or an alias; where one is served, it, whatever the name. Raises ApiError 404 that lists
        those that are there."""
        served = self.models.get(self.aliases.get(name or "", name or ""))
        if served is None and len(self.models) == 1 and not self.strict:
            served = next(iter(self.models.values()))
            if name:
                request_context.ignored.add("model")
        if served is None and not name:
            raise ApiError(400, f"Name the model: {', '.join(self.models)}.", "model", "missing_model")
        if served is None:
            assert name
            names = ", ".join(self.models)
            raise ApiError(404, f"The model '{name[:80]}' is not served here. Use {names}.", "model", "model_not_found")
        request_context.model = served.name
        return served

    def deadline(self, request_context: RequestContext) -> float:
        """When the request's time is over, by the loop's clock."""
        spent = time.monotonic() - request_context.begun
        return asyncio.get_running_loop().time() + self.limits.request_seconds - spent

    async def parts(self, model: Model, parts: list[Any], where: str, deadline: float) -> list[Any]:
        """The parts of a request as inputs of the model: text as str, media decoded. Raises ApiError where there are
        too many, or one cannot be used."""
        inputs: list[Any] = []
        self.check_parts(parts)
        for i, part in enumerate(parts):
            if isinstance(part, TextPart | str):
                inputs.append(part if isinstance(part, str) else part.text)
            elif isinstance(part, ImagePart):
                param = f"{where}.{i}.image_url"
                data = decode_data_url(part.image_url.url, "image", self.limits, param)
                inputs.append(await self.reader.read(model, "image", data, param, deadline))
            elif isinstance(part, AudioPart):
                param = f"{where}.{i}.input_audio"
                data = decode_base64(part.input_audio.data, self.limits, param)
                inputs.append(await self.reader.read(model, "audio", data, param, deadline))
            else:
                raise ApiError(400, "A part is text, image_url or input_audio.", f"{where}.{i}")
        return inputs

    def check_parts(self, parts: Iterable[Any]) -> None:
        """Raises ApiError where media are too many or texts too long, before anything is decoded."""
        media = text = 0
        for part in parts:
            media += isinstance(part, ImagePart | AudioPart)
            text += len(part if isinstance(part, str) else part.text) if isinstance(part, str | TextPart) else 0
        if media > self.limits.media_parts:
            raise ApiError(400, f"{media} media parts; at most {self.limits.media_parts} are read. Send fewer.")
        if text > self.limits.text_bytes:
            raise ApiError(413, f"{text} characters of text; at most {self.limits.text_bytes} are read. Shorten it.")

    async def prepared(self, work: Callable[[], T], size: int) -> T:
        """What `work` returns; in a thread where `size` characters take long. PlaitErrors become ApiErrors."""
        try:
            return work() if size < INLINE else await asyncio.to_thread(work)
        except PlaitError as error:
            raise as_api_error(error) from error

    async def written(
        self, served: Served, requests: list[Request], request_context: RequestContext
    ) -> list[list[Completion]]:
        """Requests written to their ends: a list of samples each."""
        pending_requests = served.worker.submit(requests, self.deadline(request_context))
        try:
            async for updates in follow(pending_requests):
                note(request_context, updates)
        finally:
            for pending in pending_requests:
                pending.cancel()
        read(request_context, pending_requests)
        return [pending.result.samples for pending in pending_requests]

    async def rendered(
        self, served: Served, column: str, completions: list[Completion], request_context: RequestContext
    ) -> list[Any]:
        """Codes as PIL images or (waveform, rate)."""
        model = served.engine_model

        def work() -> list[Any]:
            modality = model.modality(column)
            return [modality.to_object(sample) for sample in model.decode(column, completions)]

        return list(await served.worker.call(work, self.deadline(request_context)))


class Lead:
    """Takes the spaces off the beginning of a reply that comes in pieces."""

    def __init__(self, strip: bool) -> None:
        self.strip = strip

    def __call__(self, text: str) -> str:
        if self.strip:
            text = text.lstrip()
            self.strip = not text
        return text


def _most_bytes(model: PlaitModel) -> int:
    """Bytes of text beyond which no prompt fits into a model's context: as many as its longest token has, each. Normal
    form C makes a text at most three times shorter."""
    longest = max((len(token.encode()) for token in model.checkpoint.text.tokenizer.get_vocab()), default=1)
    return 3 * longest * model.engine.max_length


def note(request_context: RequestContext, updates: list[tuple[int, Delta]]) -> None:
    """Count what was written."""
    if request_context.first is None:
        request_context.first = time.monotonic() - request_context.begun
    request_context.completion_tokens += sum(len(update.ids) for _, update in updates)


def read(request_context: RequestContext, pending_requests: list[PendingRequest]) -> None:
    """Count what was read."""
    request_context.prompt_tokens += sum(len(pending.request.context) for pending in pending_requests)


def windows(model: PlaitModel, value: Any) -> list[Sequence]:
    """An input as the sequences that cover it. Raises PlaitError."""
    return model.alone(value, model.engine.max_length)


class EventStream(Response):
    """Server-sent events. `events` yields dictionaries; what it raises becomes an event that ends the stream, or,
    before the first event, an answer with a status of its own. Tickets are cancelled whatever happens."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[list[Any]],
        pending_requests: list[PendingRequest],
        done: bool = True,
        named: bool = False,
    ) -> None:
        """`done` says whether [DONE] comes last, `named` whether each event's type stands before it too."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.pending_requests, self.done, self.named = events, pending_requests, done, named

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:  # type: ignore[override]
        started = False
        try:
            async for events in self.events:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                body = b"".join(_event(event, self.named) for event in events)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            last = b"data: [DONE]\n\n" if self.done else b""
        except ApiError as error:
            scope["trail"].end = error.code or "error"
            if not started:
                await answer(error, send)
                return
            last = _event({"type": "error", **error.body()} if self.named else error.body(), self.named)
        finally:
            for pending in self.pending_requests:
                pending.cancel()
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(event: dict[str, Any], named: bool = False) -> bytes:
    name = f"event: {event['type']}\n".encode() if named else b""
    return name + b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
