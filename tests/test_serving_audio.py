"""Transcription with times, in every format, and of files of every kind; documents by their nearness."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

import plait
from conftest import tone
from plait.inference.model import PlaitModel
from plait.modalities.audio_files import decode_audio
from server import Server


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(tmp_path_factory.mktemp("audio") / "log", trained) as running:
        yield running


def recording(*clips: np.ndarray, rate: int = 8000, **form: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate(clips), rate, **(form or {"format": "WAV"}))
    return buffer.getvalue()


def encoded(wave: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """As phones and browsers record."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((wave[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", rate)
        for part in resampler.resample(frame):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def test_formats_and_times(server: Server, trained: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    wave, rate = decode_audio(tone(2, np.random.default_rng(7)))
    pause = np.zeros(4 * rate, np.float32)
    long = recording(np.tile(wave, 4), pause, wave, rate=rate)
    model = plait.load(trained)
    assert isinstance(model, PlaitModel)
    segments = model.segments(long)
    seconds = len(wave) * 5 / rate + 4
    assert segments and segments[0].start == 0 and segments[-1].end == pytest.approx(seconds)
    assert all(a.end <= b.start and a.start < a.end for a, b in pairwise(segments))
    assert any(b.start - a.end > 1 for a, b in pairwise(segments))  # nothing of the pause

    def ask(form: Any) -> Any:
        return client.audio.transcriptions.create(model="run", file=("a.wav", long), response_format=form)

    told = ask("verbose_json")
    assert told.duration == pytest.approx(seconds, abs=0.01)
    assert [(one.text, one.start) for one in told.segments] == [(s.text, pytest.approx(s.start)) for s in segments]
    times = re.findall(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> ", ask("srt"))
    starts = [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in times]
    assert starts == pytest.approx([segment.start for segment in segments], abs=0.001)
    assert ask("vtt").startswith("WEBVTT\n\n00:00:00.000 --> ") and ask("text").strip() == ask("json").text
    assert model.transcribe(long) == ask("json").text
    for form, told in (("json", "needs response_format verbose_json"), ("verbose_json", "not tell when each word")):
        with pytest.raises(openai.BadRequestError, match=told):
            client.audio.transcriptions.create(
                model="run", file=("a.wav", long), response_format=form, timestamp_granularities=["word"]
            )


def test_silence_has_no_text(server: Server, trained: Path) -> None:
    quiet = recording(np.zeros(16_000))
    assert plait.load(trained).transcribe(quiet) == ""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for form, wanted in (("json", ""), ("srt", ""), ("vtt", "WEBVTT\n\n")):
        told: Any = client.audio.transcriptions.create(model="run", file=("a.wav", quiet), response_format=form)  # type: ignore[call-overload]
        assert (told.text if form == "json" else told) == wanted
    events = list(client.audio.transcriptions.create(model="run", file=("a.wav", quiet), stream=True))
    assert [event.type for event in events] == ["transcript.text.done"]


@pytest.mark.parametrize(("container", "codec", "rate"), [("ipod", "aac", 16_000), ("webm", "libopus", 48_000)])
def test_what_phones_and_browsers_record(server: Server, container: str, codec: str, rate: int) -> None:
    wave = np.sin(np.arange(rate) * 2 * np.pi * 440 / rate).astype(np.float32) / 2
    data = encoded(wave, rate, container, codec)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    name = "a.m4a" if container == "ipod" else "a.webm"
    assert client.audio.transcriptions.create(model="run", file=(name, data)).text


def test_rerank(server: Server, trained: Path) -> None:
    documents = ["red bar", "blue bar", "green bar"]
    body = {"model": "run", "query": "red bar", "documents": [*documents[:2], {"text": documents[2]}], "top_n": 2,
            "return_documents": True}  # fmt: skip
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        status, made = server.post(path, body)
        assert status == 200, made
    vectors = plait.load(trained).embed(["red bar", *documents])
    scores = (vectors[1:] @ vectors[0]).tolist()
    order = sorted(range(3), key=lambda i: -scores[i])[:2]
    assert [one["index"] for one in made["results"]] == order and order[0] == 0
    assert [one["relevance_score"] for one in made["results"]] == pytest.approx([scores[i] for i in order], abs=1e-5)
    assert [one["document"]["text"] for one in made["results"]] == [documents[i] for i in order]
    assert json.dumps(made)
