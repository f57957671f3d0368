"""The studio's application: pages over a workspace, for one person on this machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.modalities.media import MEDIA, media_type
from plait.studio import examples, jobs, uploads
from plait.studio.labels import LabelEdits
from plait.studio.listing import Item, Previews, excerpt, list_project
from plait.studio.progress import Progress, read_progress
from plait.studio.render import FOLDER, LANGUAGES, curve, render
from plait.studio.results import Result, read_result
from plait.studio.security import FILE_POLICY, Gate
from plait.studio.use import Models
from plait.studio.workspace import Project, Workspace, safe_name, safe_path

PAGE = 60  # tiles of a gallery that come at once
BODY = 64 << 20  # bytes of a file that is asked about
FORM = 1 << 20  # bytes of what a form or a script sends
MINUTES = 3.0
SIZES = ("", "tiny", "small", "base", "large")


class Studio:
    """What the routes share.

    Args:
        workspace: The folder of all projects.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.previews = Previews()
        self.models = Models()

    def close(self) -> None:
        self.previews.close()
        self.models.close()


def make_app(studio: Studio) -> FastAPI:
    """The application, without the gate that stands before it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        studio.close()

    app = FastAPI(title="Plait studio", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.studio = studio
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    for add in (_start_pages, _data_pages, _gallery_parts, _upload_parts, _training_pages, _result_pages, _use_pages):
        add(app, studio)

    @app.exception_handler(PlaitError)
    async def refused(request: Request, error: PlaitError) -> Response:
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":
            return _page("error.html", request, status=404, message=str(error))
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> Response:
        return JSONResponse({"error": f"{error.strerror or error}. Free space or choose another folder."}, 507)

    return app


def _language(request: Request) -> str:
    asked = request.cookies.get("language") or request.headers.get("accept-language", "en")[:2].lower()
    return asked if asked in LANGUAGES else "en"


def _page(template: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(render(template, _language(request), **values), status)


async def _body(request: Request, limit: int = FORM) -> bytes:
    """A request's body. Raises PlaitError where it is longer than `limit` bytes."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise PlaitError(f"That is more than {limit >> 20} MB.")
    return bytes(data)


async def _values(request: Request) -> dict[str, Any]:
    """The JSON object or the form that a script or a button sent."""
    if request.headers.get("content-type", "").startswith("application/json"):
        import json

        try:
            found = json.loads(await _body(request))
        except ValueError as error:
            raise PlaitError("The request is no JSON.") from error
        if not isinstance(found, dict):
            raise PlaitError("The request must be a JSON object.")
        return found
    from urllib.parse import parse_qsl

    return dict(parse_qsl((await _body(request)).decode("utf-8", errors="replace"), keep_blank_values=True))


async def _in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))


# --- start ------------------------------------------------------------------------------------------------------


def _start_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/")
    def start(request: Request) -> Response:
        rows = [(project, len(project.runs)) for project in workspace.projects()]
        return _page("start.html", request, rows=rows, examples=list(examples.EXAMPLES), free=workspace.free_bytes())

    @app.post("/projects")
    async def create(request: Request) -> Response:
        project = workspace.create(str((await _values(request)).get("name", "")))
        return RedirectResponse(f"/p/{project.name}/data", 303)

    @app.post("/examples/{name}")
    async def example(name: str) -> Response:
        project = await _in_thread(examples.make, workspace, name)
        return RedirectResponse(f"/p/{project.name}/train", 303)

    @app.post("/p/{name}/delete")
    async def delete(name: str) -> Response:
        project = workspace.project(name)
        for run in project.runs:
            job = jobs.read_job(project, run.name)
            if job is not None and job.alive:
                raise PlaitError("It is being trained. Stop it first.")
        await _in_thread(workspace.delete, name)
        return RedirectResponse("/", 303)

    @app.post("/language/{code}")
    def language(code: str, request: Request) -> Response:
        answer = RedirectResponse("/", 303)
        answer.set_cookie("language", code if code in LANGUAGES else "en", samesite="strict", max_age=31_536_000)
        return answer


# --- data -------------------------------------------------------------------------------------------------------


def _data_pages(app: FastAPI, studio: Studio) -> None:
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
        return _page(
            "data.html", request, project=project, tab="data", listing=listing, texts=texts[:20], edits=edits,
            excerpts={item.path: excerpt(_place(project, item.path)) for item in texts[:20]},
            rejects=_rejects(project),
        )  # fmt: skip

    @app.post("/p/{name}/source")
    async def source(name: str, request: Request) -> Response:
        project = workspace.project(name)
        project.link(Path(str((await _values(request)).get("path", ""))))
        return RedirectResponse(f"/p/{project.name}/data", 303)


def _place(project: Project, path: str) -> Path:
    """The file of a path of the listing."""
    return project.source if project.source.is_file() else safe_path(project.source, path)


def _rejects(project: Project) -> list[dict[str, Any]]:
    import json

    try:
        lines = (project.data / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines[:200]]


def _gallery_parts(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}/items")
    def items(name: str, request: Request, label: str | None = None, offset: int = 0) -> Response:
        project = workspace.project(name)
        media = [item for item in list_project(project).of_label(label) if item.kind in MEDIA]
        part = media[max(offset, 0) : max(offset, 0) + PAGE]
        more = offset + PAGE if offset + PAGE < len(media) else None
        return _page("items.html", request, project=project, items=part, more=more, label=label)

    @app.get("/p/{name}/thumb")
    async def thumb(name: str, file: str) -> Response:
        project = workspace.project(name)
        item = Item(file, _kind(file), "")
        body = await _in_thread(studio.previews.image, project, _place(project, file), item.kind)
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
        project, values = workspace.project(name), await _values(request)
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


def _kind(file: str) -> str:
    from plait.studio.listing import kind_of

    kind = kind_of(file)
    if kind not in MEDIA:
        raise PlaitError(f"{file} is no image or audio.")
    return kind


def _upload_parts(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.post("/p/{name}/uploads")
    async def begin(name: str, request: Request) -> Response:
        values = await _values(request)
        size = values.get("size")
        if not isinstance(size, int):
            raise PlaitError("An upload needs its size in bytes.")
        number, upload = uploads.begin(workspace, workspace.project(name), str(values.get("name", "")), size)
        return JSONResponse({"id": number, "received": upload.received})

    @app.put("/p/{name}/uploads/{number}")
    async def receive(name: str, number: str, request: Request, offset: int = 0) -> Response:
        project = workspace.project(name)
        upload = uploads.find(project, number)
        received = await uploads.receive(upload, offset, request.stream())
        return JSONResponse({"received": received})

    @app.post("/p/{name}/uploads/{number}/end")
    async def end(name: str, number: str) -> Response:
        project = workspace.project(name)
        notes = await _in_thread(uploads.finish, workspace, project, uploads.find(project, number))
        return JSONResponse({"notes": notes[:50], "left_out": len(notes)})

    @app.post("/p/{name}/paste")
    async def paste(name: str, request: Request) -> Response:
        project, values = workspace.project(name), await _values(request)
        if project.linked is not None:
            raise PlaitError(f"{project.name} reads {project.linked}. Add files there.")
        file = uploads.upload_name(str(values.get("file", "")) or "pasted.txt")
        project.uploads.mkdir(exist_ok=True)
        write_atomic(project.uploads / Path(file).name, str(values.get("text", "")))
        return RedirectResponse(f"/p/{project.name}/data", 303)


# --- training ---------------------------------------------------------------------------------------------------


def _training_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}/train")
    def train(name: str, request: Request) -> Response:
        project = workspace.project(name)
        listing = list_project(project) if project.has_files else None
        rows = [(run.name, _stage(project, run)) for run in project.runs]
        busy = jobs.running(workspace)
        preview = jobs.Job(project.folder, project.next_run().name, ("--minutes", f"{MINUTES:g}"))
        return _page(
            "train.html", request, project=project, tab="train", listing=listing, rows=rows, sizes=SIZES,
            minutes=MINUTES, busy=busy, command=preview.as_text(), python=_python(project, preview.run),
        )  # fmt: skip

    @app.post("/p/{name}/train")
    async def start(name: str, request: Request) -> Response:
        project, values = workspace.project(name), await _values(request)
        if not project.has_files:
            raise PlaitError("There are no files yet. Add some under Data.")
        job = jobs.Job(project.folder, project.next_run().name, _options(values))
        await _in_thread(jobs.start, workspace, job)
        return RedirectResponse(f"/p/{project.name}/runs/{job.run}", 303)

    @app.get("/p/{name}/runs/{run}")
    def run_page(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        job = _job(project, run)
        return _page("run.html", request, project=project, tab="train", run=run, job=job, **_live(project, run))

    @app.get("/p/{name}/runs/{run}/live")
    def live(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        return _page("live.html", request, project=project, run=run, job=_job(project, run), **_live(project, run))

    @app.post("/p/{name}/runs/{run}/stop")
    def stop(name: str, run: str) -> Response:
        job = jobs.read_job(workspace.project(name), safe_name(run))
        if job is not None:
            jobs.stop(job)
        return RedirectResponse(f"/p/{name}/runs/{run}", 303)

    @app.post("/p/{name}/runs/{run}/continue")
    async def go_on(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        job = _job(project, safe_name(run))
        if job is None:
            raise PlaitError(
                f"Run {run} was not made here. Go on with: plait train {project.data} -o {project.run(run)}"
            )
        await _in_thread(jobs.start, workspace, job)
        return RedirectResponse(f"/p/{name}/runs/{run}", 303)


def _options(values: dict[str, Any]) -> tuple[str, ...]:
    """The options of `plait train` that the form asks for."""
    try:
        minutes = float(values.get("minutes") or MINUTES)
        seed = int(values.get("seed") or 0)
    except ValueError as error:
        raise PlaitError("Minutes and seed are numbers.") from error
    if not 0.1 <= minutes <= 10_000:
        raise PlaitError("Minutes lie between 0.1 and 10,000.")
    size = str(values.get("size") or "")
    if size not in SIZES:
        raise PlaitError(f"There is no size '{size}'. There are {', '.join(SIZES[1:])}.")
    found = ["--minutes", f"{minutes:g}"]
    found += ["--size", size] if size else []
    found += ["--seed", str(seed)] if seed else []
    return tuple(found)


def _job(project: Project, run: str) -> jobs.Job | None:
    job = jobs.read_job(project, safe_name(run))
    if job is None:
        project.run(run)  # raises where there is none
    return job


def _stage(project: Project, run: Path) -> str:
    job = jobs.read_job(project, run.name)
    return job.current if job is not None else "done"


def _live(project: Project, run: str) -> dict[str, Any]:
    job = jobs.read_job(project, safe_name(run))
    progress = read_progress(project.folder / "runs" / safe_name(run), job)
    stage = job.current if job is not None else "done"
    return {"progress": progress, "stage": stage, "log": jobs.last_lines(job) if job else "", **_curves(progress)}


def _curves(progress: Progress) -> dict[str, str]:
    losses = [loss for _, loss in progress.training[1:] + progress.validation]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    last = max([progress.steps, *(step for step, _ in progress.training)], default=1)
    return {
        "training_curve": curve(progress.training, last, low, high) if progress.training else "",
        "validation_curve": curve(progress.validation, last, low, high) if progress.validation else "",
    }


def _python(project: Project, run: str) -> str:
    """The lines of Python that do the same."""
    return (
        "import plait\n\n"
        f"dataset = plait.prepare({str(project.source)!r}, {str(project.data)!r})\n"
        f"run = plait.train(dataset, {str(project.folder / 'runs' / run)!r}, minutes={MINUTES:g})\n"
        "print(plait.evaluate(run))\n"
    )


# --- results ----------------------------------------------------------------------------------------------------


def _result_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}/result")
    def newest_result(name: str, request: Request) -> Response:
        project = workspace.project(name)
        run = next((run for run in project.runs if (run / "metrics.json").is_file()), None)
        if run is None:
            return _page("no_result.html", request, project=project, tab="result")
        return RedirectResponse(f"/p/{project.name}/result/{run.name}", 307)

    @app.get("/p/{name}/result/{run}")
    def result(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        folder = project.run(run)
        found = read_result(folder, project.folder / "jobs" / run)
        compared = [(other.name, _share_right(project, other)) for other in project.runs]
        return _page(
            "result.html", request, project=project, tab="result", run=run, result=found, points=_points(found),
            compared=[row for row in compared if row[1] is not None],
        )  # fmt: skip

    @app.get("/p/{name}/result/{run}/report")
    def report(name: str, run: str) -> Response:
        path = workspace.project(name).run(run) / "report.html"
        if not path.is_file():
            raise PlaitError("There is no report yet.")
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; sandbox"
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": policy})

    @app.get("/p/{name}/record/{index}")
    async def record(name: str, index: int, column: str) -> Response:
        project = workspace.project(name)
        data, kind = await _in_thread(_record, project, index, column)
        headers = {"content-security-policy": FILE_POLICY, "cache-control": "private, max-age=3600"}
        return Response(data, media_type=kind, headers=headers)


def _record(project: Project, index: int, column: str) -> tuple[bytes, str]:
    """A record's medium or text as it was prepared, and its media type."""
    from plait.data.dataset import Dataset

    dataset = Dataset.open(project.data)
    if column not in dataset.columns or not 0 <= index < len(dataset):
        raise PlaitError("There is no such record.")
    part = dataset.record(index, [column]).parts.get(column, "")
    if isinstance(part, str):
        return part.encode(), "text/plain; charset=utf-8"
    return part, media_type(part)


def _share_right(project: Project, run: Path) -> float | None:
    found = read_result(run, project.folder / "jobs" / run.name)
    return found.right / len(found.predictions) if found.predictions else None


def _points(result: Result) -> list[tuple[float, int]]:
    """(probability, right) of each answer, for the slider."""
    return [(one.answers[0][1], int(one.right)) for one in result.predictions]


# --- use --------------------------------------------------------------------------------------------------------


def _use_pages(app: FastAPI, studio: Studio) -> None:
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
            return _page("no_result.html", request, project=project, tab="use")
        verbs, kinds = await _in_thread(_abilities, studio, run)
        return _page("use.html", request, project=project, tab="use", run=run.name, verbs=verbs, kinds=kinds)

    @app.post("/p/{name}/runs/{run}/ask")
    async def ask(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        body, text = b"", ""
        if request.headers.get("content-type", "").startswith("application/json"):
            text = str((await _values(request)).get("text", ""))
        else:
            body = await _body(request, BODY)
        answer = await _in_thread(studio.models.ask, trained(project, run), project.data, body, text)
        return _page("answer.html", request, project=project, answer=answer, columns=_media_column(project))

    @app.post("/p/{name}/runs/{run}/make")
    async def make(name: str, run: str, request: Request) -> Response:
        values = await _values(request)
        verb, text = str(values.get("verb", "")), str(values.get("text", ""))
        count, seed = min(int(values.get("n", 4) or 4), 16), int(values.get("seed", 0) or 0)
        made = await _in_thread(studio.models.make, trained(workspace.project(name), run), verb, text, count, seed)
        return JSONResponse({"made": made})

    @app.post("/p/{name}/runs/{run}/chat")
    async def chat(name: str, run: str, request: Request) -> Response:
        messages = (await _values(request)).get("messages")
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in ("user", "assistant") and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise PlaitError("A conversation is a list of messages, each with a role and a content.")
        text = await _in_thread(studio.models.chat, trained(workspace.project(name), run), messages)
        return JSONResponse({"text": text})

    @app.post("/p/{name}/runs/{run}/recommend")
    async def recommend(name: str, run: str, request: Request) -> Response:
        lines = str((await _values(request)).get("history", "")).splitlines()
        history = [line.strip() for line in lines if line.strip()]
        found = await _in_thread(studio.models.recommend, trained(workspace.project(name), run), history)
        return JSONResponse({"items": found})

    @app.get("/p/{name}/hand-over")
    def hand_over(name: str, request: Request) -> Response:
        project = workspace.project(name)
        run = next(iter(project.runs), None)
        return _page("hand_over.html", request, project=project, tab="hand_over", run=run)


def _abilities(studio: Studio, run: Path) -> tuple[list[str], list[str]]:
    with studio.models.lock:
        model = studio.models.get(run)
        return list(model.verbs), sorted(set(getattr(model, "columns", {}).values()))


def _media_column(project: Project) -> str:
    from plait.data.dataset import Dataset

    try:
        columns = Dataset.open(project.data).columns
    except PlaitError:
        return ""
    return next((name for name, kind in columns.items() if kind != "text"), next(iter(columns), ""))


# --- the server -------------------------------------------------------------------------------------------------


def serve(folder: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve a workspace on 127.0.0.1 until Ctrl-C; `tell` gets the address with its token.

    Raises PlaitError where the folder or the port cannot be had.
    """
    studio = Studio(Workspace(folder))
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError as error:
        raise PlaitError(f"Port {port} cannot be had: {error.strerror}. Choose another with --port.") from error
    gate = Gate(make_app(studio), sock.getsockname()[1])
    tell(f"http://127.0.0.1:{sock.getsockname()[1]}/?token={gate.token}")
    config = uvicorn.Config(gate, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[sock])
