"""The routes of recommending."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from plait.modalities.media import media_type
from plait.recommend.model import Recommendation, RecommendationModel
from plait.server.access_log import RequestContext
from plait.server.api import make_router, service_of
from plait.server.limits import ApiError
from plait.server.schemas import Body, Name
from plait.server.service import Served, Service

router = make_router()

Condition = Annotated[str | None, Field(max_length=1000, description="As in SQL: year >= 1990 and title like '%War%'.")]


class RecommendRequest(Body):
    history: Annotated[list[Name], Field(min_length=1, max_length=1000, description="Titles or ids, oldest first.")]
    k: Annotated[int, Field(ge=1, le=100)] = 10
    exclude_seen: bool = True
    where: Condition = None
    diversity: Annotated[float, Field(ge=0, le=1)] = 0.0
    why: bool = False
    preview: Annotated[bool, Field(description="Whether small images of items come along as data: URLs.")] = False


class SimilarRequest(Body):
    item: Name
    k: Annotated[int, Field(ge=1, le=100)] = 10
    where: Condition = None
    preview: Annotated[bool, Field(description="Whether small images of items come along as data: URLs.")] = False


class ItemsRequest(Body):
    """Items whose titles hold a text; without one, those that are chosen most often."""

    text: Annotated[str, Field(max_length=256)] = ""
    k: Annotated[int, Field(ge=1, le=100)] = 12


class Reason(BaseModel):
    title: str
    lost: float


class RecommendedItem(BaseModel):
    id: str
    title: str
    probability: float
    categories: list[str]
    why: list[Reason]
    preview: str | None


class Recommendations(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[RecommendedItem]


class Listed(BaseModel):
    id: str
    title: str
    categories: list[str]


class Items(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Listed]


@router.post("/v1/plait/recommend", response_model=Recommendations, tags=["read"])
async def recommend(request: Request, body: RecommendRequest) -> Response:
    """The likeliest next items of a history. The histories of a run's own users are not served."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model = _model(served)

    def work() -> list[dict[str, Any]]:
        recommendations = model.recommend(
            body.history, k=body.k, exclude_seen=body.exclude_seen, where=body.where, diversity=body.diversity,
            why=body.why,
        )  # fmt: skip
        return [_shown(model, one, body.preview) for one in recommendations]

    request_context.prompt_tokens = len(body.history)
    return await _listed(service, served, request_context, work)


@router.post("/v1/plait/similar", response_model=Recommendations, tags=["read"])
async def similar(request: Request, body: SimilarRequest) -> Response:
    """The items that are like one; `probability` is the cosine."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model = _model(served)

    def work() -> list[dict[str, Any]]:
        return [_shown(model, one, body.preview) for one in model.similar(body.item, body.k, body.where)]

    return await _listed(service, served, request_context, work)


@router.post("/v1/plait/items", response_model=Items, tags=["read"])
async def items(request: Request, body: ItemsRequest) -> Response:
    """Items to choose from, by a part of their titles."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    model = _model(served)

    def work() -> list[dict[str, Any]]:
        places = model.look_up(body.text, body.k)
        shown = model.catalogue
        return [
            {"id": shown.items[i].id, "title": shown.name(i), "categories": shown.items[i].categories} for i in places
        ]

    return await _listed(service, served, request_context, work)


async def _listed(
    service: Service, served: Served, request_context: RequestContext, work: Callable[[], list[dict[str, Any]]]
) -> Response:
    """A list of what the model's own thread finds."""
    data = await served.worker.call(work, service.deadline(request_context))
    return JSONResponse({"object": "list", "model": served.name, "data": data})


def _model(served: Served) -> RecommendationModel:
    if "recommend" not in served.verbs:
        raise ApiError(400, f"{served.name} knows no items. It can {', '.join(served.verbs)}.", "model")
    return cast(RecommendationModel, served.engine_model)


def _shown(model: RecommendationModel, one: Recommendation, preview: bool) -> dict[str, Any]:
    image = model.image(one.id) if preview else None
    url = f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}" if image is not None else None
    return {**asdict(one), "why": [{"title": title, "lost": lost} for title, lost in one.why], "preview": url}
