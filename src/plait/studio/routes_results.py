"""The pages of results: the verdict, right and wrong answers, the report."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from plait.core.errors import PlaitError
from plait.modalities.media import media_type
from plait.studio.records import record_part
from plait.studio.render import texts
from plait.studio.results import Result, read_result
from plait.studio.security import FILE_POLICY
from plait.studio.web import Studio, in_thread, language_of, page
from plait.studio.workspace import Project


def result_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}/result")
    def newest_result(name: str, request: Request) -> Response:
        project = workspace.project(name)
        run = next((run for run in project.runs if (run / "metrics.json").is_file()), None)
        if run is None:
            return page("no_result.html", request, project=project, tab="result")
        return RedirectResponse(f"/p/{project.name}/result/{run.name}", 307)

    @app.get("/p/{name}/result/{run}")
    def result(name: str, run: str, request: Request) -> Response:
        project = workspace.project(name)
        folder = project.run(run)
        shown = read_result(folder, project.folder / "jobs" / run)
        compared = [(other.name, _share_right(project, other)) for other in project.runs]
        language = language_of(request)
        verdict, next_step = shown.verdict_in(texts(language))  # of `plait evaluate`, the next step names an option
        verdict = shown.verdict if language == "en" else verdict
        return page(
            "result.html", request, project=project, tab="result", run=run, result=shown, points=_points(shown),
            verdict=verdict, next_step=next_step,
            compared=[row for row in compared if row[1] is not None],
        )  # fmt: skip

    @app.get("/p/{name}/result/{run}/report")
    def report(name: str, run: str) -> Response:
        path = workspace.project(name).run(run) / "report.html"
        if not path.is_file():
            raise PlaitError("There is no report yet.")
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; sandbox"
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": policy})

    @app.get("/p/{name}/result/{run}/why")
    async def why(name: str, run: str, request: Request, record: str, column: str) -> Response:
        project = workspace.project(name)
        folder = project.run(run)
        shown = read_result(folder, project.folder / "jobs" / run).predictions
        one = next((one for one in shown if (one.id, one.column) == (record, column)), None)
        if one is None:
            raise PlaitError("There is no such record.")
        part = await in_thread(record_part, project, record, column)
        value = part if isinstance(part, str) else (column, part)
        answers = list(dict.fromkeys([one.answers[0][0], one.truth]))  # of a wrong answer, the right one too
        explanations = await in_thread(studio.models.why, folder, value, answers)
        return page("why.html", request, explanations=explanations)

    @app.get("/p/{name}/record")
    async def record(name: str, id: str, column: str) -> Response:
        part = await in_thread(record_part, workspace.project(name), id, column)
        text = isinstance(part, str)
        data, kind = (part.encode(), "text/plain; charset=utf-8") if text else (part, media_type(part))
        headers = {"content-security-policy": FILE_POLICY, "cache-control": "private, max-age=3600"}
        return Response(data, media_type=kind, headers=headers)


def _share_right(project: Project, run: Path) -> float | None:
    result = read_result(run, project.folder / "jobs" / run.name)
    return result.right / len(result.predictions) if result.predictions else None


def _points(result: Result) -> list[tuple[float, int]]:
    """(probability, right) of each answer, for the slider."""
    return [(one.answers[0][1], int(one.right)) for one in result.predictions]
