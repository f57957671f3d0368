"""The routes of recommending."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from plait.applications.model import Model
from plait.applications.recommending import Recommendation
from plait.serving import schemas as s
from plait.serving.api import make_router, of
from plait.serving.limits import ApiError
from plait.serving.service import Served

router = make_router()


@router.post("/v1/plait/recommend", response_model=s.Recommendations, tags=["read"])
async def recommend(request: Request, body: s.RecommendRequest) -> Response:
    """The likeliest next items of a history. The histories of a run's own users are not served."""
    service, trail = of(request)
    served = service.find(body.model, trail)
    model = _model(served)

    def work() -> list[Recommendation]:
        return model.recommend(
            body.history, k=body.k, exclude_seen=body.exclude_seen, where=body.where, diversity=body.diversity,
            why=body.why,
        )  # fmt: skip

    trail.prompt_tokens = len(body.history)
    found = await served.worker.call(work, service.deadline(trail))
    return JSONResponse({"object": "list", "model": served.name, "data": [_shown(one) for one in found]})


@router.post("/v1/plait/similar", response_model=s.Recommendations, tags=["read"])
async def similar(request: Request, body: s.SimilarRequest) -> Response:
    """The items that are like one; `probability` is the cosine."""
    service, trail = of(request)
    served = service.find(body.model, trail)
    model = _model(served)
    found = await served.worker.call(lambda: model.similar(body.item, body.k, body.where), service.deadline(trail))
    return JSONResponse({"object": "list", "model": served.name, "data": [_shown(one) for one in found]})


def _model(served: Served) -> Model:
    if "recommend" not in served.verbs:
        raise ApiError(400, f"{served.name} knows no items. It can {', '.join(served.verbs)}.", "model")
    return served.ours


def _shown(one: Recommendation) -> dict[str, Any]:
    return {**asdict(one), "why": [{"title": title, "lost": lost} for title, lost in one.why]}
