"""The pages of use: one drop zone, drawing, speaking, talking, and what features add."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from plait.core.errors import PlaitError
from plait.studio.web import Studio, in_thread, page, read_body, read_values
from plait.studio.workspace import Project

BODY = 64 << 20  # bytes of a file that is asked about


def use_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    def trained(project: Project, run: str = "") -> Path:
        runs = [project.run(run)] if run else project.runs
        found = next(
            (one for one in runs if (one / "checkpoints").is_dir() and any((one / "checkpoints").iterdir())), None
        )
        if found is None:
            raise PlaitError("No run has learnt anything yet. Start a training first.")
        return found

    @app.get("/p/{name}/use")
    async def use(name: str, request: Request) -> Response:
        project = workspace.project(name)
        try:
            run = trained(project)
        except PlaitError:
            return page("no_result.html", request, project=project, tab="use")
        verbs, kinds = await in_thread(_abilities, studio, run)
        return page(
            "use.html",
            request,
            project=project,
            tab="use",
            run=run.name,
            verbs=verbs,
            kinds=kinds,
            parts=await in_thread(studio.models.parts, run),
        )

    @app.post("/p/{name}/runs/{run}/ask")
    async def ask(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        body, text = b"", ""
        if request.headers.get("content-type", "").startswith("application/json"):
            text = str((await read_values(request)).get("text", ""))
        else:
            body = await read_body(request, BODY)
        answer = await in_thread(studio.models.ask, trained(project, run), project.data, body, text)
        return page("answer.html", request, project=project, answer=answer)

    @app.post("/p/{name}/runs/{run}/why")
    async def why(name: str, run: str, request: Request, answer: str = "") -> Response:
        project = workspace.project(name)
        body, text = b"", ""
        if request.headers.get("content-type", "").startswith("application/json"):
            text = str((await read_values(request)).get("text", ""))
        else:
            body = await read_body(request, BODY)
        value = await in_thread(studio.models.value_of, body, text)
        found = await in_thread(studio.models.why, trained(project, run), value, [answer] if answer else [])
        return page("why.html", request, found=found)

    @app.post("/p/{name}/runs/{run}/make")
    async def make(name: str, run: str, request: Request) -> Response:
        values = await read_values(request)
        verb, text = str(values.get("verb", "")), str(values.get("text", ""))
        count, seed = min(int(values.get("n", 4) or 4), 16), int(values.get("seed", 0) or 0)
        made = await in_thread(studio.models.make, trained(workspace.project(name), run), verb, text, count, seed)
        return JSONResponse({"made": made})

    @app.post("/p/{name}/runs/{run}/chat")
    async def chat(name: str, run: str, request: Request) -> Response:
        messages = (await read_values(request)).get("messages")
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in ("user", "assistant") and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise PlaitError("A conversation is a list of messages, each with a role and a content.")
        text = await in_thread(studio.models.chat, trained(workspace.project(name), run), messages)
        return JSONResponse({"text": text})

    @app.post("/p/{name}/runs/{run}/lines/{part}")
    async def lines(name: str, run: str, part: str, request: Request) -> Response:
        given = str((await read_values(request)).get("text", "")).splitlines()
        kept = [line.strip() for line in given if line.strip()]
        project = workspace.project(name)
        work = studio.models.answer_lines
        found = await in_thread(work, trained(project, run), project.data, part, kept)
        return JSONResponse({"lines": found})


def _abilities(studio: Studio, run: Path) -> tuple[list[str], list[str]]:
    with studio.models.lock:
        model = studio.models.get(run)
        return list(model.verbs), sorted(set(getattr(model, "columns", {}).values()))
