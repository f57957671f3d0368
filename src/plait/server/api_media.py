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
from plait.inference.model import joined, joined_segments
from plait.inference.requests import Request as EngineRequest
from plait.inference.results import Segment
from plait.modalities.audio_files import silent
from plait.modalities.media import MEDIA, read_by
from plait.server import answers as a
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import STREAM, engine_request_of, make_router, service_of, voice_of
from plait.server.limits import ApiError
from plait.server.media import AUDIO, audio, png
from plait.server.service import EventStream, Served, Service, note, read
from plait.server.worker import PendingRequest, follow

router = make_router()

WINDOWS = 32  # windows of a long audio that are in the queue at a time

# --- images and audio clips ----------------------------------------------------------------------------------------


@router.post("/v1/images/generations", response_model=a.ImageList, responses={200: {"content": STREAM}}, tags=["media"])
async def draw(request: Request, body: s.ImageRequest) -> Response:
    """Images of what a text says, as base64 of PNG."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model, n = served.engine_model, body.n or 1
    service.check_parts([body.prompt])
    served.check_prompt([body.prompt], "prompt")

    def prepare() -> tuple[str, EngineRequest]:
        column = model.column(body.column, "image", "draw")
        return column, engine_request_of(model, model.context([body.prompt]), column, body, n)

    column, engine_request = await service.prepared(prepare, len(body.prompt))
    side = getattr(model.modality(column).settings, "size", 0)
    size = f"{side}x{side}"
    if body.size not in (None, "auto", size):  # the answer says which size it is
        service.ignore("size", request_context)
    if body.stream:
        pending_requests = served.worker.submit([engine_request], service.deadline(request_context))
        return EventStream(
            _image_events(service, served, request_context, pending_requests, column, size), pending_requests
        )
    samples = (await service.written(served, [engine_request], request_context))[0]
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
    input_tokens, output_tokens = request_context.prompt_tokens, request_context.completion_tokens
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": input_tokens + output_tokens,
            "input_tokens_details": {"text_tokens": input_tokens, "image_tokens": 0}}  # fmt: skip


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
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model = served.engine_model
    service.check_parts([body.input])
    served.check_prompt([body.input], "input")

    def prepare() -> tuple[str, EngineRequest]:
        column = voice_of(service, request_context, model, body.voice)
        return column, engine_request_of(model, model.context([body.input]), column, body, 1)

    column, engine_request = await service.prepared(prepare, len(body.input))
    samples = (await service.written(served, [engine_request], request_context))[0]
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
    response_model=a.Transcription,
    responses={200: {"content": {**STREAM, "text/plain": {}}}},
    tags=["media"],
)
async def transcribe(request: Request, body: Annotated[s.TranscriptionRequest, Form()]) -> Response:
    """The words of an audio clip; a long one is read in windows."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    data = await body.file.read()
    if len(data) > service.limits.media.file_bytes:
        raise ApiError(413, f"The audio is larger than {service.limits.media.file_bytes // 1_000_000} MB.", "file")
    kinds = read_by(Verb.TRANSCRIBE)
    if not any(MEDIA[kind].sniff(data[:64]) for kind in kinds):  # a webm may be video as well as audio
        formats = " or ".join(MEDIA[kind].format_names for kind in sorted(kinds))
        raise ApiError(400, f"The file is no audio that is read. Send {formats}.", "file")
    model = served.model
    if "transcribe" not in served.verbs:
        raise ApiError(400, f"{served.name} cannot transcribe. It can {', '.join(served.verbs)}.", "model")
    wave, rate = await service.reader.read(
        model, "audio", data, "file", service.deadline(request_context), undivided=True
    )
    transcriber = _Transcriber(service, served, request_context, (wave, rate), body)
    if body.stream:
        return EventStream(transcriber.events(), [], done=False)
    timed = body.response_format in ("verbose_json", "srt", "vtt")
    if body.timestamp_granularities and body.response_format != "verbose_json":
        raise ApiError(400, "timestamp_granularities needs response_format verbose_json.", "timestamp_granularities")
    if silent(wave):
        segments: list[Segment] = []
    elif timed:
        segments = await transcriber.segments()
    else:
        segments = [Segment(0.0, 0.0, joined([piece async for piece in transcriber.pieces()]))]
    return _transcription(segments, len(wave) / rate, body)


class _Transcriber:
    """An audio clip on its way to text."""

    def __init__(
        self,
        service: Service,
        served: Served,
        request_context: RequestContext,
        audio: Any,
        body: s.TranscriptionRequest,
    ) -> None:
        self.service, self.served, self.request_context, self.body = service, served, request_context, body
        self.audio, self.model = audio, served.model
        self.deadline = service.deadline(request_context)
        self.language = body.language
        if (plait_model := self.model.plait_model) is not None and plait_model.columns.get(
            str(body.language)
        ) != "text":
            if body.language is not None:  # it names the text column to write
                service.ignore("language", request_context)
            self.language = None

    async def windows(self) -> AsyncIterator[Segment]:
        """The text of each window of one of our models, and when it was said, in order."""
        model, body = self.served.engine_model, self.body

        def prepare() -> tuple[list[tuple[float, float]], list[EngineRequest]]:
            column = model.column(self.language, "text", "transcribe")
            drawing = s.SamplingBody(temperature=body.temperature, seed=body.seed)
            windows = model.spoken(self.audio)
            engine_requests = [
                engine_request_of(model, part, column, drawing, 1, i) for i, (_, _, part) in enumerate(windows)
            ]
            return [(start, end) for start, end, _ in windows], engine_requests

        times, engine_requests = await self.service.prepared(prepare, 1 << 20)
        batch_size = min(WINDOWS, model.engine.max_rows)
        for at in range(0, len(engine_requests), batch_size):
            results = await self.service.written(
                self.served, engine_requests[at : at + batch_size], self.request_context
            )
            for (start, end), samples in zip(times[at : at + batch_size], results, strict=True):
                yield Segment(start, end, samples[0].text or "")

    async def pieces(self) -> AsyncIterator[str]:
        """The text, window by window."""
        if self.model.plait_model is not None:
            async for segment in self.windows():
                yield segment.text
        else:
            call = self.served.worker.call
            yield await call(lambda: self.model.transcribe(self.audio, language=self.language), self.deadline)

    async def segments(self) -> list[Segment]:
        """What is said when."""
        words = "word" in (self.body.timestamp_granularities or ())
        if self.model.plait_model is not None and not words:
            return joined_segments([segment async for segment in self.windows()])
        call, language = self.served.worker.call, self.language
        return list(await call(lambda: self.model.segments(self.audio, language, words=words), self.deadline))

    async def events(self) -> AsyncIterator[list[Any]]:
        texts: list[str] = []
        async for piece in self.pieces():
            text_so_far, longer = joined(texts), joined([*texts, piece])
            texts.append(piece)
            if len(longer) > len(text_so_far):
                yield [{"type": "transcript.text.delta", "delta": longer[len(text_so_far) :]}]
        usage = {k: v for k, v in _media_usage(self.request_context).items() if k != "input_tokens_details"}
        yield [{"type": "transcript.text.done", "text": joined(texts), "usage": {"type": "tokens", **usage}}]


def _transcription(segments: list[Segment], seconds: float, body: s.TranscriptionRequest) -> Response:
    """The answer in the format that was asked for."""
    text, form = " ".join(segment.text for segment in segments), body.response_format
    if form == "text":
        return PlainTextResponse(text + "\n")
    if form in ("srt", "vtt"):
        return PlainTextResponse(subtitles(segments, form), media_type="text/vtt" if form == "vtt" else "text/plain")
    if form == "json":
        return JSONResponse({"text": text})
    listed = [{"id": i, "seek": 0, "start": round(segment.start, 3), "end": round(segment.end, 3), "text": segment.text,
               "tokens": [], "temperature": 0.0, "avg_logprob": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
              for i, segment in enumerate(segments)]  # fmt: skip
    answer = {"task": "transcribe", "language": body.language or "", "duration": round(seconds, 3), "text": text}
    granularities = body.timestamp_granularities or ["segment"]
    if "segment" in granularities:
        answer["segments"] = listed
    if "word" in granularities:
        answer["words"] = [{"word": one.text, "start": round(one.start, 3), "end": round(one.end, 3)}
                           for segment in segments for one in segment.words]  # fmt: skip
    return JSONResponse(answer)


def subtitles(segments: list[Segment], form: str) -> str:
    """Segments as SubRip ("srt") or WebVTT ("vtt")."""
    mark = "," if form == "srt" else "."

    def time_of(seconds: float) -> str:
        ms = round(seconds * 1000)
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"

    blocks = [
        (f"{i}\n" if form == "srt" else "") + f"{time_of(one.start)} --> {time_of(one.end)}\n"
        + one.text.replace("-->", "->") + "\n"
        for i, one in enumerate(segments, 1)
    ]  # fmt: skip
    return ("WEBVTT\n\n" if form == "vtt" else "") + "\n".join(blocks)
