"""Mutated files of every kind through `prepare`: no traceback, no hang, no crash of the parent, bounded memory.

PLAIT_FUZZ=2000 python -m pytest -m slow tests/test_fuzz.py       # so many files instead of a few hundred
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from conftest import make_image

COUNT = int(os.environ.get("PLAIT_FUZZ", "240"))
SECONDS, MEMORY = 20, 2 << 30  # for a file on average; of the largest process, bytes

# Prepares each source in this process, and says how it ended; what is no PlaitError is told with its traceback.
CHILD = """
import sys, traceback
from pathlib import Path
from plait.core.errors import PlaitError
from plait.data.prepare import prepare
for number, source in enumerate(sys.argv[2:]):
    try:
        manifest = prepare(source, Path(sys.argv[1]) / str(number), workers=1)
        ended = f"{sum(manifest.counts.values())} records, {manifest.rejected} rejected"
    except PlaitError as error:
        ended = f"refused: {error}"
    except Exception:
        ended = "FAULT " + traceback.format_exc()
    print(f"{source}: {ended}", flush=True)
"""


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    make_image(1, np.random.default_rng(0)).save(buffer, kind)
    return buffer.getvalue()


def audio(kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    wave = np.sin(np.arange(4000) * 0.2).astype(np.float32) / 2
    soundfile.write(buffer, wave, 8000, format=kind, subtype=subtype)
    return buffer.getvalue()


def video(container: str, codec: str) -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for n in range(8):
            picture = np.full((32, 32, 3), 30 * n, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                out.mux(packet)
        out.mux(stream.encode(None))
    return buffer.getvalue()


ROWS = [{"text": f"some words {n}", "label": "ab"[n % 2], "n": n} for n in range(30)]
CSV = ("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS)).encode()
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHAT = (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n") * 9


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(4):
            archive.writestr(f"{'ab'[n % 2]}/{n}.png", image("PNG"))
    return buffer.getvalue()


def tarred(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for n in range(4):
            entry = tarfile.TarInfo(f"{'ab'[n % 2]}/{n}.wav")
            entry.size = len(data := audio("WAV"))
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


MADE: dict[str, Callable[[], bytes]] = {
    "png": lambda: image("PNG"), "jpg": lambda: image("JPEG"), "gif": lambda: image("GIF"),
    "webp": lambda: image("WEBP"), "bmp": lambda: image("BMP"), "tiff": lambda: image("TIFF"),
    "wav": lambda: audio("WAV"), "flac": lambda: audio("FLAC"), "ogg": lambda: audio("OGG", "VORBIS"),
    "mp3": lambda: audio("MP3"), "aiff": lambda: audio("AIFF"), "mp4": lambda: video("mp4", "mpeg4"),
    "webm": lambda: video("webm", "libvpx"), "csv": lambda: CSV, "tsv": lambda: CSV.replace(b",", b"\t"),
    "jsonl": lambda: LINES, "json": lambda: json.dumps(ROWS).encode(), "chat.jsonl": CHAT.encode,
    "csv.gz": lambda: gzip.compress(CSV), "parquet": parquet, "arrow": arrow, "txt": lambda: b"Some text.\n" * 40,
    "zip": zipped, "tar": lambda: tarred("w:"), "tar.gz": lambda: tarred("w:gz"),
}  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Flipped bits, a cut, a part twice, a part gone, zeros, noise, or a number replaced by a large one."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(found) or 1) if draw.random() < 0.6 else draw.randrange(min(len(found), 64) or 1)
        span = draw.choice((1, 2, 4, 16, 200))
        way = draw.randrange(7)
        if way == 0 and found:
            found[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            del found[at:]
        elif way == 2:
            found[at:at] = found[at : at + span]
        elif way == 3:
            del found[at : at + span]
        elif way == 4:
            found[at : at + span] = bytes(span)
        elif way == 5:
            found[at : at + span] = draw.randbytes(span)
        else:
            found[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"9999"))
    return bytes(found)


@pytest.mark.slow
def test_mutated_files_cost_themselves_alone(tmp_path: Path) -> None:
    draw, sources = random.Random(int(os.environ.get("PLAIT_FUZZ_SEED", "0"))), []
    for number in range(COUNT):
        kind = list(MADE)[number % len(MADE)]
        file = tmp_path / "in" / f"{number:05d}" / f"a.{kind}"
        file.parent.mkdir(parents=True)
        file.write_bytes(mutated(MADE[kind](), draw))
        if number % 2:  # beside one that is whole
            (file.parent / f"whole.{kind}").write_bytes(MADE[kind]())
        sources.append(str(file.parent if number % 2 else file))
    environment = {**os.environ, "PLAIT_STORE_PATIENCE": "0.2"}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "out", *sources], env=environment, capture_output=True, text=True,
        timeout=SECONDS * COUNT,
    )  # fmt: skip
    assert ended.returncode == 0, (ended.returncode, ended.stdout[-500:], ended.stderr[-2000:])
    lines = ended.stdout
    assert "FAULT" not in lines, lines[lines.index("FAULT") - 200 :][:4000]
    assert "Traceback" not in ended.stderr
    assert sum(line.startswith(str(tmp_path)) for line in lines.splitlines()) == COUNT
    assert "records" in lines and "refused" in lines  # both happen
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MEMORY
