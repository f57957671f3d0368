"""The pages of training: start, watch, stop, go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.modalities.media import media_type
from plait.studio import jobs
from plait.studio.listing import Listing, list_project
from plait.studio.progress import Progress, read_progress
from plait.studio.render import curve
from plait.studio.security import FILE_POLICY
from plait.studio.seen import seen_task
from plait.studio.watch import read_watched, sample_file
from plait.studio.web import Studio, in_thread, page, read_values
from plait.studio.worker import is_prepared
from plait.studio.workspace import Project, safe_name
from plait.training.expectation import Expected, expected

MINUTES = 3.0
SIZES = ("", "tiny", "small", "base", "large")


def training_pages(app: FastAPI, studio: Studio) -> None:
    """All of them."""
    _start_pages(app, studio)
    _watch_pages(app, studio)
    _control_pages(app, studio)


def _start_pages(app: FastAPI, studio: Studio) -> None:
    """The form, and what it starts."""
    workspace = studio.workspace

    @app.get("/p/{name}/train")
    def train(name: str, request: Request) -> Response:
        project = workspace.project(name)
        listing = list_project(project) if project.has_files else None
        rows = [(run.name, _stage(project, run)) for run in project.runs]
        busy = jobs.running(workspace)
        preview = jobs.Job(project.folder, project.next_run().name, ("--minutes", f"{MINUTES:g}"))
        return page(
            "train.html", request, project=project, tab="train", listing=listing, rows=rows, sizes=SIZES,
            minutes=MINUTES, task=seen_task(project, listing), expected=_expected(project, listing), busy=busy,
            command=preview.as_text(), python=_python(project, preview.run),
        )  # fmt: skip

    @app.post("/p/{name}/train")
    async def start(name: str, request: Request) -> Response:
        project, values = workspace.project(name), await read_values(request)
        if not project.has_files:
            raise PlaitError("There are no files yet. Add some under Data.")
        job = jobs.Job(project.folder, project.next_run().name, _options(values))
        await in_thread(jobs.start, workspace, job)
        return RedirectResponse(f"/p/{project.name}/runs/{job.run}", 303)


def _watch_pages(app: FastAPI, studio: Studio) -> None:
    """A run as it learns: curves, samples, what it says."""
    workspace = studio.workspace

    @app.get("/p/{name}/runs/{run}")
    def run_page(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        job = _job(project, run)
        return page("run.html", request, project=project, tab="train", run=run, job=job, **_live(project, run))

    @app.get("/p/{name}/runs/{run}/live")
    def live(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        return page("live.html", request, project=project, run=run, job=_job(project, run), **_live(project, run))

    @app.get("/p/{name}/runs/{run}/log")
    def log(name: str, run: str) -> Response:
        job = _job(workspace.project(name), run)
        return HTMLResponse(escape(jobs.last_lines(job, 40) if job else ""))

    @app.get("/p/{name}/runs/{run}/samples/{file}")
    def sample(name: str, run: str, file: str) -> Response:
        path = sample_file(workspace.project(name).run(run), file)
        headers = {"content-security-policy": FILE_POLICY, "cache-control": "private, max-age=3600"}
        with path.open("rb") as opened:
            kind = media_type(opened.read(64))
        return FileResponse(path, media_type=kind, headers=headers)


def _control_pages(app: FastAPI, studio: Studio) -> None:
    """Stopping, and going on."""
    workspace = studio.workspace

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
        await in_thread(jobs.start, workspace, job)
        return RedirectResponse(f"/p/{name}/runs/{run}", 303)

    @app.post("/p/{name}/runs/{run}/more")
    async def more(name: str, run: str, request: Request) -> Response:
        project, values = workspace.project(name), await read_values(request)
        job, minutes = _job(project, safe_name(run)), _minutes(values)
        if job is None:
            raise PlaitError(
                f"Run {run} was not made here. Go on with: plait train {project.run(run)} --more {minutes:g}"
            )
        if job.current != "done":
            raise PlaitError("This training has not come to its end. Let it end first.")
        if not await in_thread(is_prepared, project):
            raise PlaitError("Files or labels changed since. What is trained for longer keeps its data: train anew.")
        await in_thread(jobs.start, workspace, replace(job, options=_with_more(job.options, minutes)))
        return RedirectResponse(f"/p/{name}/runs/{run}", 303)


def _minutes(values: dict[str, Any]) -> float:
    """The minutes that a form asks for."""
    try:
        minutes = float(values.get("minutes") or MINUTES)
    except ValueError as error:
        raise PlaitError("Minutes are a number.") from error
    if not 0.1 <= minutes <= 10_000:
        raise PlaitError("Minutes lie between 0.1 and 10,000.")
    return minutes


def _with_more(options: tuple[str, ...], minutes: float) -> tuple[str, ...]:
    """The options of a run that is to have so many minutes more: with the minutes that it then has in all, so that the
    command can be given again."""
    values = list(options)
    if "--minutes" not in values:
        raise PlaitError("This training was given steps, not minutes. Go on with: plait train RUN --more MINUTES")
    place = values.index("--minutes") + 1
    values[place] = f"{float(values[place]) + minutes:g}"
    return tuple(values)


def _expected(project: Project, listing: Listing | None) -> Expected | None:
    """What to expect: of media by their folders, of tables by the labels that the dataset has, once there is one."""
    counts = Counter(item.kind for item in listing.items if item.label) if listing else Counter()
    if counts and listing is not None:
        kind, count = counts.most_common(1)[0]
        return expected(kind, count, len({item.label for item in listing.items if item.label}))
    if not (project.data / "manifest.json").is_file():
        return None
    statistics = Dataset.open(project.data).manifest.statistics
    classes = next((column.classes for column in statistics.values() if column.classes), {})
    return expected("text", sum(classes.values()), len(classes))


def _options(values: dict[str, Any]) -> tuple[str, ...]:
    """The options of `plait train` that the form asks for."""
    minutes = _minutes(values)
    try:
        seed = int(values.get("seed") or 0)
    except ValueError as error:
        raise PlaitError("The seed is a number.") from error
    size = str(values.get("size") or "")
    if size not in SIZES:
        raise PlaitError(f"There is no size '{size}'. There are {', '.join(SIZES[1:])}.")
    arguments = ["--minutes", f"{minutes:g}"]
    arguments += ["--size", size] if size else []
    arguments += ["--seed", str(seed)] if seed else []
    return tuple(arguments)


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
    folder = project.folder / "runs" / safe_name(run)
    progress = read_progress(folder, job)
    stage = job.current if job is not None else "done"
    curves = _curves(progress, running=stage in jobs.RUNNING)
    return {"progress": progress, "stage": stage, "watched": read_watched(folder), **curves}


def _curves(progress: Progress, running: bool) -> dict[str, str]:
    """The lines of the chart: up to the steps that are planned while it runs, else up to the last one."""
    losses = [loss for _, loss in progress.training[1:] + progress.validation]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    last = max([progress.steps if running else 1, *(step for step, _ in progress.training)], default=1)
    return {
        "training_curve": curve(progress.training, last, low, high) if len(progress.training) > 1 else "",
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
