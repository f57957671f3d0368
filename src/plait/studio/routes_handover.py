"""The page of handing over: files to take away, a server with a key, and the same from Python and the shell."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from plait.studio import handover
from plait.studio.security import FILE_POLICY
from plait.studio.snippets import snippets
from plait.studio.web import Studio, in_thread, page, read_values


def handover_pages(app: FastAPI, studio: Studio) -> None:
    workspace = studio.workspace

    @app.get("/p/{name}/hand-over")
    async def hand_over(name: str, request: Request) -> Response:
        project = workspace.project(name)
        run = next((run for run in project.runs if (run / "checkpoints" / "best").exists()), None)
        verbs = await in_thread(studio.models.verbs, run) if run else []
        kinds = await in_thread(studio.models.kinds, run) if run else []
        return page(
            "hand_over.html", request, project=project, tab="hand_over", run=run,
            forms=await in_thread(studio.models.forms, run) if run else [],
            server=handover.server_of(project), snippets=await in_thread(snippets, run, verbs, kinds) if run else [],
        )  # fmt: skip

    @app.post("/p/{name}/runs/{run}/export")
    async def export(name: str, run: str, request: Request) -> Response:
        project, values = workspace.project(name), await read_values(request)
        form = str(values.get("form", ""))
        exported = await in_thread(handover.export, project, project.run(run), form)
        return JSONResponse({"file": exported.name, "bytes": exported.stat().st_size})

    @app.get("/p/{name}/runs/{run}/export/{form}")
    def download(name: str, run: str, form: str) -> Response:
        project = workspace.project(name)
        path = handover.exported_file(project, project.run(run).name, form)
        title = f"{project.name}.html" if form == "page" else path.name
        return FileResponse(path, filename=title, headers={"content-security-policy": FILE_POLICY})

    @app.post("/p/{name}/runs/{run}/serve")
    async def serve(name: str, run: str) -> Response:
        project = workspace.project(name)
        server, key = await in_thread(handover.start_server, project, project.run(run))
        return JSONResponse({"address": server["address"], "key": key})

    @app.post("/p/{name}/serve/stop")
    async def stop(name: str) -> Response:
        await in_thread(handover.stop_server, workspace.project(name))
        return JSONResponse({})
