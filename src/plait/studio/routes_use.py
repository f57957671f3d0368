"""The pages of use: one drop zone, drawing, speaking, talking, and what features add."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Generator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from plait.core.errors import PlaitError
from plait.modalities.media import MEDIA
from plait.server.page_parts import LinesPart
from plait.studio.use import read_messages
from plait.studio.web import Studio, in_thread, page, read_body, read_values
from plait.studio.workspace import Project

BODY = 64 << 20  # bytes of a file that is asked about


def use_pages(app: FastAPI, studio: Studio) -> None:
    """All of them."""
    _ask_pages(app, studio)
    _make_pages(app, studio)


def _ask_pages(app: FastAPI, studio: Studio) -> None:
    """One drop zone: what a file or a text is, and why."""
    workspace = studio.workspace

    @app.get("/p/{name}/use")
    async def use(name: str, request: Request) -> Response:
        project = workspace.project(name)
        try:
            run = _trained(project)
        except PlaitError:
            return page("no_result.html", request, project=project, tab="use")
        verbs, kinds, can_chat = await in_thread(_abilities, studio, run)
        return page(
            "use.html",
            request,
            project=project,
            tab="use",
            run=run.name,
            verbs=verbs,
            kinds=kinds,
            can_chat=can_chat,
            parts=await in_thread(_parts, studio, run, project.data),
        )

    @app.post("/p/{name}/runs/{run}/ask")
    async def ask(name: str, run: str, request: Request, brief: bool = False) -> Response:
        project = workspace.project(name)
        body, text = await _asked(request)
        answer = await in_thread(studio.models.ask, _trained(project, run), project.data, body, text, brief)
        return page("answer.html", request, project=project, answer=answer)

    @app.post("/p/{name}/runs/{run}/find")
    async def find(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        body, text = await _asked(request)
        result = await in_thread(studio.models.find, _trained(project, run), project.data, body, text)
        return page("found.html", request, project=project, run=run, result=result)

    @app.post("/p/{name}/runs/{run}/why")
    async def why(name: str, run: str, request: Request, answer: str = "") -> Response:
        project = workspace.project(name)
        body, text = await _asked(request)
        value = await in_thread(studio.models.value_of, body, text)
        explanations = await in_thread(studio.models.why, _trained(project, run), value, [answer] if answer else [])
        return page("why.html", request, explanations=explanations)


def _parts(studio: Studio, run: Path, data: Path) -> list[tuple[LinesPart, list[str]]]:
    """What features add for a run's model, each with lines to try it with."""
    return [(part, studio.models.examples(run, data, part)) for part in studio.models.parts(run)]


def _make_pages(app: FastAPI, studio: Studio) -> None:
    """Drawing, speaking, talking, and what features add."""
    workspace = studio.workspace

    @app.post("/p/{name}/runs/{run}/make")
    async def make(name: str, run: str, request: Request) -> Response:
        values = await read_values(request)
        verb, text = str(values.get("verb", "")), str(values.get("text", ""))
        count, seed = min(int(values.get("n", 4) or 4), 16), int(values.get("seed", 0) or 0)
        media_urls = await in_thread(
            studio.models.make, _trained(workspace.project(name), run), verb, text, count, seed
        )
        return JSONResponse({"made": media_urls})

    @app.post("/p/{name}/runs/{run}/chat")
    async def chat(name: str, run: str, request: Request) -> Response:
        values = await read_values(request, BODY)
        messages, seed = read_messages(values.get("messages")), int(values.get("seed") or 0)
        pieces = _Pieces(studio.models.chat(_trained(workspace.project(name), run), messages, seed))
        first = await in_thread(pieces.read)  # what is wrong shows before the reply begins
        return StreamingResponse(_spoken(first, pieces), media_type="text/plain; charset=utf-8")

    @app.post("/p/{name}/runs/{run}/lines/{part}")
    async def lines(name: str, run: str, part: str, request: Request) -> Response:
        text_lines = str((await read_values(request)).get("text", "")).splitlines()
        filled_lines = [line.strip() for line in text_lines if line.strip()]
        project = workspace.project(name)
        work = studio.models.answer_lines
        answers = await in_thread(work, _trained(project, run), project.data, part, filled_lines)
        return JSONResponse({"lines": answers})


class _Pieces:
    """A reply that one thread may end while another waits for its next piece."""

    def __init__(self, pieces: Generator[str]) -> None:
        self._pieces, self._lock = pieces, threading.Lock()

    def read(self) -> str:
        """The next piece, "" at the end."""
        with self._lock:
            return next(self._pieces, "")

    def close(self) -> None:
        with self._lock:
            self._pieces.close()


async def _spoken(first: str, pieces: _Pieces) -> AsyncIterator[str]:
    """The pieces of a reply; when the reader goes away the reply ends."""
    try:
        yield first
        while piece := await in_thread(pieces.read):
            yield piece
    finally:
        asyncio.get_running_loop().run_in_executor(None, pieces.close)


def _trained(project: Project, run: str = "") -> Path:
    """A run that has a checkpoint: that of the name, else the newest. Raises PlaitError where there is none."""
    for folder in [project.run(run)] if run else project.runs:
        if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
            return folder
    raise PlaitError("No run has learnt anything yet. Start a training first.")


async def _asked(request: Request) -> tuple[bytes, str]:
    """What a request holds: a file's bytes, or a text."""
    if request.headers.get("content-type", "").startswith("application/json"):
        return b"", str((await read_values(request)).get("text", ""))
    return await read_body(request, BODY), ""


def _abilities(studio: Studio, run: Path) -> tuple[list[str], list[str], bool]:
    """What a run's model can do, the kinds that it reads, and whether it holds conversations."""
    with studio.models.lock:
        model = studio.models.get(run)
        columns = getattr(model, "columns", {})
        has_turns = getattr(getattr(model, "vocabulary", None), "turns", False)
        can_chat = "generate" in model.offered_verbs and (bool(has_turns) or not columns)
        return list(model.offered_verbs), sorted({*MEDIA, "text"}.intersection(columns.values())), can_chat
