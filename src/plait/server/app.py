"""The server put together: models, application, guard, sockets."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import Request

from plait.core import dist
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import sha256_file
from plait.inference.model import attach_adapters, load
from plait.server import api, api_decisions, api_media, api_messages, api_responses, api_text
from plait.server.access_log import Metrics, set_up_logging
from plait.server.heap import limit_arenas
from plait.server.limits import ApiError, Limits, read_keys
from plait.server.middleware import AccessMiddleware, AccessPolicy
from plait.server.network import listen, make_server
from plait.server.service import Served, Service

ROUTES: ExtensionPoint[APIRouter] = ExtensionPoint("routes")  # what features serve
# Of a feature: opens what a command line names, for the models that are served.
RESOURCES: ExtensionPoint[Callable[[list[str], list[Served]], Any]] = ExtensionPoint("served_resources")
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
_MEMBER = re.compile(r"body|str|int|(list|constrained|function|tagged|nullable|model)[-[(].*", re.DOTALL)
log = logging.getLogger("plait.server")


def serve(
    models: list[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    key_file: Path | None = None,
    allow_hosts: list[str] | None = None,
    allow_origins: list[str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    resources: dict[str, list[str]] | None = None,
    page: Callable[[Any, Service], Any] | None = None,
    aliases: list[str] | None = None,
    strict: bool = False,
    adapters: list[str] | None = None,
    limits: Limits = Limits(),
    announce: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve models until SIGINT or SIGTERM; `announce` is called with the address once requests are taken.

    A model is a run, a checkpoint, or a Hugging Face name or folder; `NAME=MODEL` gives it another name. `page`
    puts an application with a page at `/` before the API. `resources` are things of features that are served beside
    the models, by the feature's name: {"search": ["photos.index"]}. An alias, NAME=MODEL, is a further name of a model
    that is served. An adapter, NAME=DIR, is the first model with low-rank updates, under a name of its own and in the
    same batch. With `strict`, fields that have no effect are refused. Raises PlaitError for what cannot be loaded,
    an address that cannot be had, and one off loopback without keys.
    """
    limit_arenas()
    access_policy = make_access_policy(host, key_file, allow_hosts or [], allow_origins or [])
    access_policy.browsers = page is not None
    sock = listen(host, port)
    served = load_models(models, device, precision, limits, adapters or [])
    opened = {feature: RESOURCES.by_feature()[feature](names, served) for feature, names in (resources or {}).items()}
    service = Service(served, limits, Metrics(), opened, read_aliases(aliases or [], served), strict)
    app: Any = make_app(service, access_policy)
    if page is not None:
        app = page(app, service)
    guard = AccessMiddleware(app, access_policy, limits, service.metrics, _routes())
    set_up_logging()

    def stop(seconds: float) -> None:
        guard.stopping = True
        log.info("stopping", extra={"fields": {"seconds": seconds}})
        error = ApiError(503, "The server is stopping. Try again soon.", code="stopping")

        def end() -> None:
            for served in service.models.values():
                served.worker.give_up(error)

        asyncio.get_running_loop().call_later(seconds, end)

    def started() -> None:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{sock.getsockname()[1]}"
        log.info("listening", extra={"fields": {"url": url, "models": list(service.models)}})
        if key_file is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        announce(url)

    def reload() -> None:
        assert key_file is not None
        try:
            access_policy.keys = read_keys(key_file)
        except PlaitError as error:  # the keys as they were go on
            log.error("keys", extra={"fields": {"error": str(error)}})
        else:
            log.info("keys", extra={"fields": {"keys": sorted(access_policy.keys)}})

    server = make_server(guard, limits, stop, service.metrics.closed)
    server.on_start = started
    service.metrics.connections = server.server_state.connections
    # uvicorn raises the signal once more after its work is done; by then it has no meaning.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
        service.reader.close()


def serve_mcp(
    server: Any, host: str, port: int, key_file: Path | None, allow_hosts: list[str], allow_origins: list[str],
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Serve a Model Context Protocol server over streamable HTTP at /mcp, behind the same guard as the API, until
    SIGINT or SIGTERM. Nothing is kept between requests."""
    from mcp.server.transport_security import TransportSecuritySettings

    access_policy = make_access_policy(host, key_file, allow_hosts, allow_origins)
    sock, limits, metrics = listen(host, port), Limits(), Metrics()
    transport_security = TransportSecuritySettings(
        enable_dns_rebinding_protection=False
    )  # the guard judges hosts and origins
    app = server.streamable_http_app(
        json_response=True, stateless_http=True, transport_security=transport_security, host=host
    )
    guard = AccessMiddleware(app, access_policy, limits, metrics, {"/mcp"})
    set_up_logging()

    def stop(seconds: float) -> None:
        guard.stopping = True

    http = make_server(guard, limits, stop, metrics.closed)
    http.on_start = lambda: tell(f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}")
    metrics.connections = http.server_state.connections
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        http.run(sockets=[sock])
    finally:
        sock.close()


def load_models(
    names: list[str], device: str, precision: str, limits: Limits, adapters: list[str] | None = None
) -> list[Served]:
    """The models of a command line, loaded, and the first one with each of the adapters. Raises PlaitError."""
    served: dict[str, Served] = {}
    for model_option in names:
        name, _, path = (
            model_option.rpartition("=")
            if "=" in model_option and not Path(model_option).exists()
            else ("", "", model_option)
        )
        model = load(path, device, precision)
        folder = model.folder
        assert folder is not None  # `load` knows it
        name = name or (Path(path).resolve().name if Path(path).expanduser().is_dir() else path)
        if name in served:
            raise PlaitError(f"Two models have the name '{name}'. Give one another: other={path}")
        state = folder / "manifest.json" if (folder / "manifest.json").is_file() else folder / "config.json"
        twins = attach_adapters(model, read_adapters(adapters)) if adapters and not served else []
        served[name] = Served.of(name, model, folder, f"plait-{sha256_file(state)[:12]}", limits)
        for twin in twins:
            if twin.name in served:
                raise PlaitError(f"--adapter {twin.name}=...: the name '{twin.name}' is taken. Choose another.")
            served[twin.name] = served[name].sharing(twin)
    if not served:
        raise PlaitError("Name a model to serve: a run, a checkpoint, or a Hugging Face name or folder.")
    return list(served.values())


def read_adapters(options: list[str]) -> dict[str, str]:
    """Folders of adapters by name, from NAME=DIR. Raises PlaitError where it is not written so."""
    folders = {}
    for text in options:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise PlaitError(f"--adapter {text} must be NAME=DIR.")
        folders[name] = folder
    return folders


def _routers() -> list[APIRouter]:
    text = (api_text.router, api_responses.router, api_messages.router)
    return [api.router, *text, api_media.router, api_decisions.router, *ROUTES.all()]


def read_aliases(options: list[str], models: list[Served]) -> dict[str, str]:
    """Further names of models, from NAME=MODEL. Raises PlaitError for one that is taken, or that leads nowhere."""
    model_names, models_by_alias = {served.name for served in models}, dict[str, str]()
    for alias in options:
        name, _, model = alias.partition("=")
        if not name or model not in model_names:
            raise PlaitError(f"--alias {alias} must be NAME=MODEL, with MODEL one of {', '.join(sorted(model_names))}.")
        if name in model_names or name in models_by_alias:
            raise PlaitError(f"--alias {alias}: the name '{name}' is taken. Choose another.")
        models_by_alias[name] = model
    return models_by_alias


def make_access_policy(
    host: str, key_file: Path | None, allow_hosts: list[str], allow_origins: list[str]
) -> AccessPolicy:
    """Who may come in, for an address. Raises PlaitError for one that others can reach while no key is needed."""
    keys = read_keys(key_file) if key_file is not None else {}
    local = _is_loopback(host)
    if not local and not keys:
        raise PlaitError(
            f"{host} can be reached by others, so keys are needed. Make one: plait key keys.txt, "
            "and serve with --api-key-file keys.txt; or leave --host out."
        )
    if bad := [origin for origin in allow_origins if "*" in origin or "://" not in origin]:
        raise PlaitError(f"'{bad[0]}' is no origin. Name each as https://app.example.org; there is no wildcard.")
    if bad := [name for name in allow_hosts if "*" in name or "/" in name]:
        raise PlaitError(f"'{bad[0]}' is no host name. Name each as api.example.org; there is no wildcard.")
    hosts = {name.lower() for name in allow_hosts} | LOOPBACK
    hosts.add(f"[{host}]" if ":" in host else host.lower())
    return AccessPolicy(hosts, {origin.lower().rstrip("/") for origin in allow_origins}, keys, any_address=not local)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _routes() -> set[str]:
    return {route.path for router in _routers() for route in router.routes if isinstance(route, APIRoute)}


# --- the application --------------------------------------------------------------------------------------------


def make_app(service: Service, access_policy: AccessPolicy) -> FastAPI:
    """The routes over the models; `Guard` stands before it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        workers = list(dict.fromkeys(served.worker for served in service.models.values()))
        for worker in workers:
            service.metrics.workers.append(worker)
            worker.start()
        yield
        for worker in workers:
            worker.stop()

    app = FastAPI(
        title="Plait",
        version=dist.VERSION,
        description="Models that read and write text, images and audio, in the shapes of OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    MultiPartParser.spool_max_size = service.limits.body_bytes  # an upload stays in memory, where its body is already
    for router in _routers():
        app.include_router(router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _broken)
    app.openapi = lambda: _describe(app, bool(access_policy.keys))  # type: ignore[method-assign]
    return app


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ApiError):
        status = getattr(error, "status_code", 500)
        message = {404: "There is no such route. See /openapi.json.", 405: "The route does not take this method."}.get(
            status, str(getattr(error, "detail", ""))
        )
        error = ApiError(status, message, headers=getattr(error, "headers", None))
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Of a union's faults, one for each of its members, the one that says most: a bound, else the deepest."""
    faults: list[dict[str, Any]] = list(error.errors()) if isinstance(error, RequestValidationError) else []
    fault = max(
        faults,
        key=lambda fault: (not str(fault["type"]).endswith("_type"), len(fault["loc"])),
        default={"loc": (), "msg": "The body is not valid."},
    )
    # Members of unions stand in the place like fields: list[...], constrained-str.
    places = [str(place) for place in fault["loc"] if not _MEMBER.fullmatch(str(place))]
    param = ".".join(places) or None
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault.get("type") == "extra_forbidden":
        message = (
            f"Unknown field '{str(fault['loc'][-1])[:64]}'. Leave it out; see /openapi.json for those that are known."
        )
    elif fault.get("type") == "missing" and not places:
        message = "The request needs a body of JSON. Send Content-Type: application/json."
    elif fault.get("type") == "model_attributes_type" and not places:
        message = "The body must be a JSON object. Send Content-Type: application/json."
    elif places:
        message = f"{param[:120] if param else ''}: {message}."
    code = "unknown_field" if fault.get("type") == "extra_forbidden" else "invalid_value"
    return JSONResponse(ApiError(400, message, param and param[:120], code).body(), 400)


async def _broken(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(ApiError(500, "Something went wrong in the server.").body(), 500)


def _describe(app: FastAPI, keys: bool) -> dict[str, Any]:
    """The OpenAPI document, without the errors that FastAPI would send and this server does not."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        parts = document.setdefault("components", {})
        for name, schema in parts.get("schemas", {}).items():
            if name.endswith("Request"):
                schema["properties"]["model"]["anyOf"][0]["enum"] = list(app.state.service.models)
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        if keys:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
            document["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = document
    return app.openapi_schema
