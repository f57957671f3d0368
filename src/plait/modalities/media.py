"""The registry of media: which modality a file is of, and decoding in processes of their own.

Imports no torch. `MEDIA` is the one list of what files Plait reads; no other file has endings or formats of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from plait.core.rejects import RejectKind
from plait.core.system import limit_memory, read_line
from plait.modalities.audio_files import AUDIO
from plait.modalities.descriptor import LIMITS, Limits, MediaError, MediaFiles, Packed
from plait.modalities.image_files import IMAGE
from plait.modalities.video_files import VIDEO

MEDIA: dict[str, MediaFiles] = {files.kind: files for files in (IMAGE, AUDIO, VIDEO)}
KINDS = (*MEDIA, "text")  # of columns, in the order in which they are shown
_BY_SUFFIX = {suffix: kind for kind, files in MEDIA.items() for suffix in files.suffixes}


def kind_of_suffix(suffix: str) -> str | None:
    """The kind of media that files of an ending (".png") are, or None."""
    return _BY_SUFFIX.get(suffix.lower())


def written_by(verb: str) -> frozenset[str]:
    """The kinds of media that a command makes from words: of "draw", images."""
    return frozenset(kind for kind, files in MEDIA.items() if files.writes == verb)


def read_by(verb: str) -> frozenset[str]:
    """The kinds of media that a command puts into words: of "transcribe", audio."""
    return frozenset(kind for kind, files in MEDIA.items() if files.verb == verb)


def sniff(head: bytes) -> tuple[str, str] | None:
    """(kind, format) from a file's first 64 bytes or more, or None where it is none of the formats that are read. Of a
    container that may hold audio alone or images too, the richer kind."""
    for kind in reversed(MEDIA):
        if name := MEDIA[kind].sniff(head):
            return kind, name
    return None


def kind_of_file(head: bytes, suffix: str) -> str | None:
    """The kind of a file: what its first 64 bytes show; of a container that may hold several, as its ending says."""
    sniffed = sniff(head)
    by_suffix = kind_of_suffix(suffix)
    if by_suffix and MEDIA[by_suffix].sniff(head):
        return by_suffix
    return sniffed[0] if sniffed else None


def media_type(data: bytes) -> str:
    """The media type of encoded bytes, as `data:` URLs want it."""
    sniffed = sniff(data[:64])
    if sniffed is None:
        return "application/octet-stream"
    return next(form.media_type for form in MEDIA[sniffed[0]].formats if form.name == sniffed[1])


def known_formats() -> str:
    """What is read, for people: "image (png, jpeg, ...), audio (...)"."""
    return ", ".join(f"{kind} ({files.format_names})" for kind, files in MEDIA.items())


def preview(kind: str, data: bytes, value: Any) -> bytes:
    """A medium small enough to be kept in an index or shown in a browser: itself, a thumbnail, its first seconds."""
    return MEDIA[kind].preview(data, value)


class Checker:
    """Decodes media in a process of its own, one for each thread that calls it: a decoder that crashes takes its
    process along, and nothing else. `close()` ends the processes."""

    def __init__(self, limits: Limits = LIMITS, patience: float = 120.0) -> None:
        self.limits, self.patience = limits, patience
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            # A plain process, not multiprocessing: nothing of the caller's main module is imported again.
            room = str(Path(__file__).parents[2])
            code = (
                "import sys; sys.path.insert(0, sys.argv[1]); from plait.modalities.media import _serve; "
                "_serve(sys.argv[2])"
            )
            limits = json.dumps(self.limits.__dict__)
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, room, limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            self._own.process = process
            with self._lock:
                self._all.append(process)
        return process

    def __call__(self, kind: str, data: bytes) -> dict[str, Any]:
        """What decoding shows (`MediaFiles.check`); a crash or a decoder that hangs is a MediaError too."""
        return self._ask(kind, data, with_samples=False).facts

    def decode(self, kind: str, data: bytes) -> Any:
        """As the modality decodes it, but nothing in this process touches the encoded bytes. A large image comes
        reduced (`MediaFiles.pack`)."""
        return MEDIA[kind].unpack(self._ask(kind, data, with_samples=True))

    def _ask(self, kind: str, data: bytes, with_samples: bool) -> Packed:
        process = self._process()
        assert process.stdin is not None and process.stdout is not None
        body = b""
        try:
            process.stdin.write(struct.pack("<BBQ", list(MEDIA).index(kind), with_samples, len(data)))
            process.stdin.write(data)
            process.stdin.flush()
            line = read_line(process, lambda: True, self.patience)
        except OSError:  # a pipe whose other end is gone
            line = b""
        if line is None:
            process.wait()
            raise MediaError(f"decoding took more than {self.patience:g} s", RejectKind.TOO_SLOW)
        answer: dict[str, Any] = {}
        if line:
            answer = json.loads(line)
            body = process.stdout.read(answer.pop("bytes"))
        if not line or process.poll() is not None:
            process.wait()
            raise MediaError("the decoder crashed", RejectKind.CRASHED)
        if "error" in answer:
            raise MediaError(answer["error"], RejectKind(answer["kind"]))
        return Packed(answer, body)

    def close(self) -> None:
        for process in self._all:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if process.stdout is not None:
                process.stdout.close()
            process.kill()
            process.wait()


def _serve(limits: str) -> None:
    """The loop of a checking process: header and bytes on stdin; for each, one JSON line on stdout, and the pixels or
    samples where they are asked for."""
    limit_memory(3 << 30)
    allowed = Limits(**json.loads(limits))
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while len(header := stdin.read(10)) == 10:
        place, with_samples, size = struct.unpack("<BBQ", header)
        files = list(MEDIA.values())[place]
        data, body = stdin.read(size), b""
        answer: dict[str, Any]
        try:
            if with_samples:
                packed = files.pack(files.decode(data, allowed))
                answer, body = packed.facts, packed.body
            else:
                answer = files.check(data, allowed)
        except MediaError as error:
            answer = {"error": error.reason.detail, "kind": error.reason.kind}
        except MemoryError:
            answer = {"error": "", "kind": RejectKind.NO_MEMORY}
        stdout.write(json.dumps({**answer, "bytes": len(body)}).encode() + b"\n" + body)
        stdout.flush()
