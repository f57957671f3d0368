"""The routes of images and audio clips."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Form, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.responses import Response

from plait.inference.base import Verb
from plait.inference.engine import Completion
from plait.inference.engine import Request as Wanted
from plait.inference.model import joined
from plait.modalities.media import read_by, sniff
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import STREAM, make_router, of, voice_of, wanted_of
from plait.server.limits import ApiError
from plait.server.media import AUDIO, audio, png
from plait.server.service import EventStream, Served, Service, note, read, windows
from plait.server.worker import PendingRequest, follow

router = make_router()

WINDOWS = 32  # windows of a long audio that are in the queue at a time

# --- images and audio clips ----------------------------------------------------------------------------------------


@router.post("/v1/images/generations", response_model=s.ImageList, responses={200: {"content": STREAM}}, tags=["media"])
async def draw(request: Request, body: s.ImageRequest) -> Response:
    """Images of what a text says, as base64 of PNG."""
    service, request_context = of(request)
    served = service.open(body, request_context)
    model, n = served.ours, body.n or 1
    service.check_parts([body.prompt])
    served.check_prompt([body.prompt], "prompt")

    def prepare() -> tuple[str, Wanted]:
        column = model.column(body.column, "image", "draw")
        return column, wanted_of(model, model.context([body.prompt]), column, body, n)

    column, wanted = await service.prepared(prepare, len(body.prompt))
    side = getattr(model.modality(column).settings, "size", 0)
    size = f"{side}x{side}"
    if body.size not in (None, "auto", size):  # the answer says which size it is
        service.ignore("size", request_context)
    if body.stream:
        pending_requests = served.worker.submit([wanted], service.deadline(request_context))
        return EventStream(
            _image_events(service, served, request_context, pending_requests, column, size), pending_requests
        )
    samples = (await service.written(served, [wanted], request_context))[0]
    images = await service.rendered(served, column, samples, request_context)
    encoded = await asyncio.to_thread(lambda: [png(image) for image in images])
    return JSONResponse({
        "created": int(time.time()), "data": [_image_data(one, body.response_format) for one in encoded],
        "output_format": "png",
        "size": size, "usage": _media_usage(request_context),
    })  # fmt: skip


def _image_data(encoded: str, form: str) -> dict[str, str]:
    """An image as the client wants it; a URL is a data: URL, since nothing is kept."""
    return {"b64_json": encoded} if form == "b64_json" else {"url": f"data:image/png;base64,{encoded}"}


def _media_usage(request_context: RequestContext) -> dict[str, Any]:
    read_, written = request_context.prompt_tokens, request_context.completion_tokens
    return {"input_tokens": read_, "output_tokens": written, "total_tokens": read_ + written,
            "input_tokens_details": {"text_tokens": read_, "image_tokens": 0}}  # fmt: skip


async def _image_events(
    service: Service,
    served: Served,
    request_context: RequestContext,
    pending_requests: list[PendingRequest],
    column: str,
    size: str,
) -> AsyncIterator[list[Any]]:
    async for updates in follow(pending_requests):
        note(request_context, updates)
    read(request_context, pending_requests)
    for image in await service.rendered(served, column, pending_requests[0].result.samples, request_context):
        yield [{"type": "image_generation.completed", "b64_json": await asyncio.to_thread(png, image),
                "created_at": int(time.time()), "size": size, "output_format": "png", "quality": "auto",
                "background": "auto", "usage": _media_usage(request_context)}]  # fmt: skip


@router.post(
    "/v1/audio/speech",
    response_class=Response,
    responses={200: {"content": {**{kind: {} for kind, *_ in AUDIO.values()}, **STREAM}}},
    tags=["media"],
)
async def speak(request: Request, body: s.SpeechRequest) -> Response:
    """A text spoken, as the bytes of an audio clip file."""
    service, request_context = of(request)
    served = service.open(body, request_context)
    model = served.ours
    service.check_parts([body.input])
    served.check_prompt([body.input], "input")

    def prepare() -> tuple[str, Wanted]:
        column = voice_of(service, request_context, model, body.voice)
        return column, wanted_of(model, model.context([body.input]), column, body, 1)

    column, wanted = await service.prepared(prepare, len(body.input))
    samples = (await service.written(served, [wanted], request_context))[0]
    wave, rate = (await service.rendered(served, column, samples, request_context))[0]
    data = await asyncio.to_thread(audio, wave, rate, body.response_format)
    if body.stream_format == "audio":
        return Response(data, media_type=AUDIO[body.response_format][0])

    async def events() -> AsyncIterator[list[Any]]:
        yield [{"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()},
               {"type": "speech.audio.done", "usage": _media_usage(request_context)}]  # fmt: skip

    return EventStream(events(), [], done=False)


@router.post(
    "/v1/audio/transcriptions",
    response_model=s.Transcription,
    responses={200: {"content": {**STREAM, "text/plain": {}}}},
    tags=["media"],
)
async def transcribe(request: Request, body: Annotated[s.TranscriptionRequest, Form()]) -> Response:
    """The words of an audio clip; a long one is read in windows."""
    service, request_context = of(request)
    served = service.open(body, request_context)
    deadline = service.deadline(request_context)
    data = await body.file.read()
    if len(data) > service.limits.media.file_bytes:
        raise ApiError(413, f"The audio is larger than {service.limits.media.file_bytes // 1_000_000} MB.", "file")
    if (sniff(data[:64]) or ("",))[0] not in read_by(Verb.TRANSCRIBE):
        raise ApiError(400, "The file is no audio that is read. Send wav, flac, ogg, opus or mp3.", "file")
    model = served.model
    if "transcribe" not in served.verbs:
        raise ApiError(400, f"{served.name} cannot transcribe. It can {', '.join(served.verbs)}.", "model")
    value = await service.reader.read(model, "audio", data, "file", deadline)
    if model.plait_model is not None:
        pieces = _windows_written(service, served, request_context, value, body)
    else:
        other = model

        async def whole() -> AsyncIterator[str]:
            yield await served.worker.call(lambda: other.transcribe(value, language=body.language), deadline)

        pieces = whole()
    if body.stream:

        async def events() -> AsyncIterator[list[Any]]:
            texts: list[str] = []
            async for piece in pieces:
                known, now = joined(texts), joined([*texts, piece])
                texts.append(piece)
                if len(now) > len(known):
                    yield [{"type": "transcript.text.delta", "delta": now[len(known) :]}]
            yield [
                {
                    "type": "transcript.text.done",
                    "text": joined(texts),
                    "usage": {
                        "type": "tokens",
                        **{k: v for k, v in _media_usage(request_context).items() if k != "input_tokens_details"},
                    },
                }
            ]

        return EventStream(events(), [], done=False)
    text = joined([piece async for piece in pieces])
    return PlainTextResponse(text + "\n") if body.response_format == "text" else JSONResponse({"text": text})


async def _windows_written(
    service: Service, served: Served, request_context: RequestContext, value: Any, body: s.TranscriptionRequest
) -> AsyncIterator[str]:
    """The text of each window of an audio clip, in order."""
    model = served.ours
    language = body.language
    if language is not None and model.columns.get(language) != "text":  # it names the text column to write
        service.ignore("language", request_context)
        language = None

    def prepare() -> list[Wanted]:
        column = model.column(language, "text", "transcribe")
        drawing = s.Drawing(temperature=body.temperature, seed=body.seed)
        return [wanted_of(model, part, column, drawing, 1, i) for i, part in enumerate(windows(model, value))]

    wanted = await service.prepared(prepare, 0)
    some = min(WINDOWS, model.engine.max_rows)
    for start in range(0, len(wanted), some):
        results: list[list[Completion]] = await service.written(served, wanted[start : start + some], request_context)
        for samples in results:
            yield samples[0].text or ""
