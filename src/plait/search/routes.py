"""The route of search."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from plait.core.errors import PlaitError
from plait.modalities.media import media_type
from plait.server import answers as a
from plait.server import schemas as s
from plait.server.api import make_router, service_of
from plait.server.limits import ApiError
from plait.server.service import INLINE, Served, Service, windows

if TYPE_CHECKING:
    from plait.search.index import Hit, Index

router = make_router()


@router.post("/v1/plait/search", response_model=a.SearchResults, tags=["read"])
async def search(request: Request, body: s.SearchRequest) -> Response:
    """What of an index is nearest to a text, an image or an audio clip, best first."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    name, index = _index(service, served.name, body.index)
    where = _condition(index, body.where or {})
    words = body.input if isinstance(body.input, str) else getattr(body.input, "text", None)
    deadline = service.deadline(request_context)
    vector = None
    if body.by != "words":
        values = await service.parts(served.model, [body.input], "input", deadline)
        model = served.model
        if (plait_model := model.plait_model) is not None:
            parts = await service.prepared(lambda: [windows(plait_model, values[0])], len(words or ""))
            request_context.prompt_tokens = sum(map(len, parts[0]))
            vector = (await served.worker.call(lambda: plait_model.embed_parts(parts), deadline))[0]
        else:
            vector = (await served.worker.call(lambda: model.embed_inputs(values), deadline))[0]
    hits = await service.prepared(lambda: index.find(vector, words, body.k, where, body.by), INLINE)
    data = [_found(hit, body.preview) for hit in hits]
    return JSONResponse({"object": "list", "model": served.name, "index": name, "data": data})


def _index(service: Service, model: str, asked_name: str | None) -> tuple[str, Index]:
    """The index of a name, or a model's first."""
    known = {name: index for name, (index, owner) in service.resources.get("search", {}).items() if owner == model}
    if not known:
        raise ApiError(404, f"No index of {model} is served here. Start the server with --index INDEX.", "model")
    if asked_name is not None and asked_name not in known:
        raise ApiError(404, f"There is no index '{asked_name[:80]}' of {model}. Use {', '.join(known)}.", "index")
    name = asked_name or next(iter(known))
    return name, known[name]


def _condition(index: Index, where: dict[str, str | list[str]]) -> str | None:
    """SQL of our own making: clients send columns and values, never conditions."""
    pieces = []
    for column, values in where.items():
        if column not in index.columns:
            message = f"The index has no column '{column[:80]}'. Its columns are {', '.join(index.columns)}."
            raise ApiError(400, message, "where")
        allowed_values = [values] if isinstance(values, str) else values
        listed = ", ".join("'" + value.replace("'", "''") + "'" for value in allowed_values)
        pieces.append(f"`{column}` IN ({listed})")
    return " AND ".join(pieces) or None


def _found(hit: Hit, preview: bool) -> dict[str, Any]:
    """A hit as it is told: without the paths of the server's machine."""
    shown = None
    if preview and hit.preview is not None:
        shown = f"data:{media_type(hit.preview)};base64,{base64.b64encode(hit.preview).decode()}"
    return {
        "id": hashlib.sha256(hit.id.encode()).hexdigest()[:24], "kind": hit.kind,
        "source": hit.source.replace("\\", "/").rpartition("/")[2],
        "similarity": None if hit.similarity != hit.similarity else hit.similarity, "score": hit.score,
        "text": hit.text, "columns": hit.columns, "preview": shown, "start": hit.start, "stop": hit.stop,
    }  # fmt: skip


def open_indexes(names: list[str], models: list[Served]) -> dict[str, tuple[Index, str]]:
    """The indexes of a command line, each with the name of the model that made it. Raises PlaitError."""
    from plait.search.index import Index  # with libraries that are large, and of no use without an index

    opened: dict[str, tuple[Index, str]] = {}
    for option in names:
        name, _, path = option.rpartition("=") if "=" in option and not Path(option).exists() else ("", "", option)
        name = name or path.rstrip("/").rpartition("/")[2]
        if name in opened:
            raise PlaitError(f"Two indexes have the name '{name}'. Give one another: other={path}")
        wrong: PlaitError | None = None
        for served in models:
            try:
                opened[name] = Index(path, served.model), served.name
            except PlaitError as error:
                wrong = error
        if name not in opened:
            raise wrong or PlaitError(f"{path} has no model.")
        if not len(opened[name][0]):
            raise PlaitError(f"{path} is empty. Fill it: plait index add {path} FILES --model RUN")
    return opened
