"""The start page, and the pages of data: files, the gallery, labels, uploads."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response

from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.modalities.media import MEDIA, media_type
from plait.studio import examples, jobs, uploads
from plait.studio.excerpts import read_excerpt
from plait.studio.findings import Twin, count_pairs, read_pairs, read_rejects, read_review
from plait.studio.labels import LabelEdits
from plait.studio.listing import EXCERPT, kind_of, list_project
from plait.studio.render import LANGUAGES
from plait.studio.security import FILE_POLICY
from plait.studio.web import Studio, in_thread, page, read_values
from plait.studio.workspace import Project, safe_path

PAGE = 60  # tiles of a gallery that come at once
PAIRS = 24  # near-duplicates that come at once


def start_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/")
    def start(request: Request) -> Response:
        rows = [(project, len(project.runs)) for project in workspace.projects()]
        return page("start.html", request, rows=rows, examples=list(examples.offered()), free=workspace.free_bytes())

    @app.post("/projects")
    async def create(request: Request) -> Response:
        project = workspace.create(str((await read_values(request)).get("name", "")))
        return RedirectResponse(f"/p/{project.name}/data", 303)

    @app.post("/examples/{name}")
    async def example(name: str) -> Response:
        project = await in_thread(examples.make, workspace, name)
        return RedirectResponse(f"/p/{project.name}/train", 303)

    @app.post("/p/{name}/delete")
    async def delete(name: str) -> Response:
        project = workspace.project(name)
        for run in project.runs:
            job = jobs.read_job(project, run.name)
            if job is not None and job.alive:
                raise PlaitError("It is being trained. Stop it first.")
        await in_thread(workspace.delete, name)
        return RedirectResponse("/", 303)

    @app.post("/language/{code}")
    def language(code: str, request: Request) -> Response:
        answer = RedirectResponse("/", 303)
        answer.set_cookie("language", code if code in LANGUAGES else "en", samesite="strict", max_age=31_536_000)
        return answer


def data_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}")
    def project_page(name: str) -> Response:
        return RedirectResponse(f"/p/{workspace.project(name).name}/data", 307)

    @app.get("/p/{name}/data")
    def data(name: str, request: Request) -> Response:
        project = workspace.project(name)
        listing = list_project(project) if project.has_files else None
        texts = [item for item in listing.items if item.kind == "text"] if listing else []
        edits = len(LabelEdits(project.folder / "labels.jsonl").edits)
        rejects, rejected = read_rejects(project.data)
        suspects, candidates = read_review(project) if listing else ([], [])
        return page(
            "data.html", request, project=project, tab="data", listing=listing, texts=texts[:20], edits=edits,
            excerpts=[read_excerpt(_place(project, item.path), item.path) for item in texts[:20]],
            rejects=rejects, rejected=rejected, pairs=count_pairs(project), suspects=suspects, candidates=candidates,
        )  # fmt: skip

    @app.post("/p/{name}/source")
    async def source(name: str, request: Request) -> Response:
        project = workspace.project(name)
        project.link(Path(str((await read_values(request)).get("path", ""))))
        return RedirectResponse(f"/p/{project.name}/data", 303)


def _place(project: Project, path: str) -> Path:
    """The file of a path of the listing."""
    return project.source if project.source.is_file() else safe_path(project.source, path)


def gallery_parts(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}/items")
    def items(name: str, request: Request, label: str | None = None, offset: int = 0) -> Response:
        project = workspace.project(name)
        media = [item for item in list_project(project).of_label(label) if item.kind in MEDIA]
        part = media[max(offset, 0) : max(offset, 0) + PAGE]
        next_offset = offset + PAGE if offset + PAGE < len(media) else None
        return page("items.html", request, project=project, items=part, more=next_offset, label=label)

    @app.get("/p/{name}/pairs")
    def pairs(name: str, request: Request, offset: int = 0) -> Response:
        project, offset = workspace.project(name), max(offset, 0)
        near_pairs = read_pairs(project, offset, PAIRS)
        next_offset = offset + PAIRS if offset + PAIRS < count_pairs(project) else None
        texts = _texts_of(project, [one for pair in near_pairs for one in (pair.first, pair.second) if not one.file])
        return page("pairs.html", request, project=project, pairs=near_pairs, more=next_offset, texts=texts)

    @app.get("/p/{name}/thumb")
    async def thumb(name: str, file: str) -> Response:
        project = workspace.project(name)
        work = partial(studio.previews.image, project, _place(project, file), _kind(file))
        body = await asyncio.get_running_loop().run_in_executor(studio.decoding, work)
        headers = {"cache-control": "private, max-age=86400", "content-security-policy": FILE_POLICY}
        return Response(body, media_type="image/png", headers=headers)

    @app.get("/p/{name}/file")
    def original(name: str, file: str) -> Response:
        place = _place(workspace.project(name), file)
        with place.open("rb") as opened:
            kind = media_type(opened.read(64))
        return FileResponse(place, media_type=kind, headers={"content-security-policy": FILE_POLICY})

    @app.post("/p/{name}/labels")
    async def labels(name: str, request: Request) -> Response:
        project, values = workspace.project(name), await read_values(request)
        edits = LabelEdits(project.folder / "labels.jsonl")
        files = [str(file) for file in values.get("files", [])]
        action = values.get("action")
        if action == "move":
            edits.move(files, str(values.get("label", "")))
        elif action == "rename":
            edits.rename(str(values.get("old", "")), str(values.get("label", "")))
        elif action == "delete":
            edits.delete(files)
        elif action == "undo":
            edits.undo()
        else:
            raise PlaitError(f"There is no edit '{action}'. There are move, rename, delete and undo.")
        return JSONResponse({"edits": len(edits.edits)})


def _texts_of(project: Project, twins: list[Twin]) -> dict[str, str]:
    """Record id -> what it says, of records of tables and texts."""
    if not twins:
        return {}
    from plait.data.dataset import Dataset

    dataset = Dataset.open(project.data)
    texts = [column for column, kind in dataset.columns.items() if kind == "text"]
    place = {one: i for i, one in enumerate(dataset.ids)}
    numbers = sorted({place[twin.id] for twin in twins if twin.id in place})
    records = dataset.iterate(numbers, texts)
    return {one.id: " · ".join(str(one.parts[c]) for c in texts if c in one.parts)[:EXCERPT] for one in records}


def _kind(file: str) -> str:
    kind = kind_of(file)
    if kind not in MEDIA:
        raise PlaitError(f"{file} is no image or audio.")
    return kind


def upload_parts(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.post("/p/{name}/uploads")
    async def begin(name: str, request: Request) -> Response:
        values = await read_values(request)
        size = values.get("size")
        if not isinstance(size, int):
            raise PlaitError("An upload needs its size in bytes.")
        project, modified = workspace.project(name), float(values.get("modified") or 0)
        number, upload = uploads.begin(workspace, project, str(values.get("name", "")), size, modified)
        return JSONResponse({"id": number, "received": upload.received})

    @app.put("/p/{name}/files")
    async def receive_many(name: str, request: Request) -> Response:
        project = workspace.project(name)
        return JSONResponse({"files": await uploads.receive_many(workspace, project, request.stream())})

    @app.put("/p/{name}/uploads/{number}")
    async def receive(name: str, number: str, request: Request, offset: int = 0) -> Response:
        project = workspace.project(name)
        upload = uploads.find(project, number)
        received = await uploads.receive(upload, offset, request.stream())
        return JSONResponse({"received": received})

    @app.post("/p/{name}/uploads/{number}/end")
    async def end(name: str, number: str) -> Response:
        project = workspace.project(name)
        notes = await in_thread(uploads.finish, workspace, project, uploads.find(project, number))
        return JSONResponse({"notes": notes[:50], "left_out": len(notes)})

    @app.post("/p/{name}/paste")
    async def paste(name: str, request: Request) -> Response:
        project, values = workspace.project(name), await read_values(request)
        if project.linked is not None:
            raise PlaitError(f"{project.name} reads {project.linked}. Add files there.")
        file = uploads.upload_name(str(values.get("file", "")) or "pasted.txt")
        project.uploads.mkdir(exist_ok=True)
        write_atomic(project.uploads / Path(file).name, str(values.get("text", "")))
        return RedirectResponse(f"/p/{project.name}/data", 303)
