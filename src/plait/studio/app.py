"""The studio's application: pages over a workspace, for one person on this machine."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from plait.core.errors import PlaitError
from plait.studio.render import FOLDER
from plait.studio.routes_data import data_pages, gallery_parts, start_pages, upload_parts
from plait.studio.routes_handover import handover_pages
from plait.studio.routes_results import result_pages
from plait.studio.routes_training import training_pages
from plait.studio.routes_use import use_pages
from plait.studio.security import Gate
from plait.studio.uploads import sweep
from plait.studio.web import Studio, page
from plait.studio.workspace import Workspace


@dataclass(frozen=True)
class Tab:
    """A tab of a project.

    Attributes:
        name: What its pages give as `tab`.
        path: Of its first page, below the project's address.
        title: By language.
        add: Adds its pages to the application.
    """

    name: str
    path: str
    title: Mapping[str, str]
    add: Callable[[FastAPI, Studio], None]


TABS = (
    Tab("data", "data", {"en": "Data", "zh": "数据"}, data_pages),
    Tab("train", "train", {"en": "Train", "zh": "训练"}, training_pages),
    Tab("result", "result", {"en": "Result", "zh": "结果"}, result_pages),
    Tab("use", "use", {"en": "Use", "zh": "使用"}, use_pages),
    Tab("hand_over", "hand-over", {"en": "Hand over", "zh": "交付"}, handover_pages),
)


def make_app(studio: Studio) -> FastAPI:
    """The application, without the gate that stands before it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        studio.close()

    app = FastAPI(title="Plait studio", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.studio, app.state.tabs = studio, TABS
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    for add in (start_pages, gallery_parts, upload_parts, *(tab.add for tab in TABS)):
        add(app, studio)

    @app.exception_handler(PlaitError)
    async def refused(request: Request, error: PlaitError) -> Response:
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":
            return page("error.html", request, status=404, message=str(error))
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> Response:
        where = f"{error.filename}: " if error.filename else ""
        advice = "Free space or choose another folder."
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "It may only be read: allow writing there, or start the studio with another folder."
        return JSONResponse({"error": f"{where}{error.strerror or error}. {advice}"}, 507)

    return app


def serve(folder: Path, port: int, announce: Callable[[str], None]) -> None:
    """Serve a workspace on 127.0.0.1 until Ctrl-C; `announce` gets the address with its token.

    Raises PlaitError where the folder or the port cannot be had.
    """
    studio = Studio(Workspace(folder))
    sweep(studio.workspace)
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError as error:
        raise PlaitError(f"Port {port} cannot be had: {error.strerror}. Choose another with --port.") from error
    gate = Gate(make_app(studio), sock.getsockname()[1])
    announce(f"http://127.0.0.1:{sock.getsockname()[1]}/?token={gate.token}")
    config = uvicorn.Config(gate, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[sock])
