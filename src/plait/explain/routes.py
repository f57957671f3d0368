"""The route of explanations."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from plait.explain.report import as_json_of, as_png
from plait.modalities.text import words
from plait.server import answers as a
from plait.server import schemas as s
from plait.server.api import make_router, service_of
from plait.server.limits import ApiError

EXPLAINED = 256  # words of an input that are explained at once

router = make_router()


@router.post("/v1/plait/explain", response_model=a.Explained, response_model_exclude_none=True, tags=["read"])
async def explain(request: Request, body: s.ExplainRequest) -> Response:
    """How much each word, region or moment of an input moved an answer, with checks that say whether to believe it."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    parts: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    deadline = service.deadline(request_context)
    values = await service.parts(served.model, parts, "input", deadline)
    # Each word is left out once, and each of these is a pass through the model.
    if (count := sum(len(words(value)) for value in values if isinstance(value, str))) > EXPLAINED:
        raise ApiError(413, f"The input has {count} words; at most {EXPLAINED} are explained. Send fewer.", "input")
    model = served.model

    def work() -> dict[str, Any]:
        explanation = model.explain(
            values if len(values) > 1 else values[0], body.answer, column=body.column, labels=body.labels,
            method=body.method, steps=body.steps, seed=body.seed,
        )  # fmt: skip
        shown = as_json_of(explanation)
        if body.image:
            shown["image"] = "data:image/png;base64," + base64.b64encode(as_png(explanation)).decode()
        return shown

    shown = await served.worker.call(work, deadline)
    return JSONResponse({"object": "explanation", "model": served.name, **shown})
