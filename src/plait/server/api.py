"""The routes, in OpenAI's shapes: what all share, the state of the server, embeddings and classification."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from plait.core import dist
from plait.core.errors import PlaitError
from plait.inference.base import Verb
from plait.inference.constrained import TextConstraint
from plait.inference.model import PlaitModel
from plait.inference.requests import Request as EngineRequest
from plait.inference.results import Predictions
from plait.inference.sampling import Options, SamplingOptions
from plait.modalities.media import written_by
from plait.model.multimodal import Sequence
from plait.server import answers as a
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.limits import ApiError, parse_json
from plait.server.service import Served, Service, windows
from plait.server.tools import ToolUse


class _Body(Request):
    async def json(self) -> Any:
        body, limits = await self.body(), self.app.state.service.limits
        return parse_json(body, limits) if len(body) < APART else await asyncio.to_thread(parse_json, body, limits)


class _Route(APIRoute):
    """A route whose JSON is read within the limits."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def limited(request: Request) -> Response:
            return await handle(_Body(request.scope, request.receive))

        return limited


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": a.ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be met as it is; the message says what to send instead.",
        401: "A key is needed.",
        403: "Host or origin is not allowed.",
        404: "No such model or route.",
        413: "Too large.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "A fault of the server.",
        503: "The server is stopping, or has too many connections.",
        504: "It took longer than the server allows.",
    }.items()
}
APART = 16_384  # bytes of JSON that are parsed on the event loop
READ_AT_ONCE = 65_536  # tokens that one request has embedded or classified
VOICES = {"alloy", "ash", "ballad", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
          "cedar"}  # fmt: skip
COMPILE_SECONDS = 1.0  # that a schema or grammar may take
EVENT = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
STREAM = {"text/event-stream": {"schema": EVENT}}


def make_router() -> APIRouter:
    """A router whose bodies are read within the limits and whose errors are OpenAI's."""
    return APIRouter(route_class=_Route, responses=ERRORS)


router = make_router()


def service_of(request: Request) -> tuple[Service, RequestContext]:
    """The service and the context of a request."""
    return request.app.state.service, request.scope["trail"]


# --- what all generating routes share ---------------------------------------------------------------------------


def engine_request_of(model: PlaitModel, prompt: Sequence, column: str | None, body: s.SamplingBody, n: int,
            first: int = 0, max_tokens: int | None = None, stop: tuple[str, ...] = ()) -> EngineRequest:  # fmt: skip
    """The engine's request for what a body asks for."""
    greedy = body.temperature == 0 or body.top_p == 0
    # The engine's seeds are 63 bits; a negative one is another number, always the same.
    seed = (secrets.randbits(63) if body.seed is None else body.seed) & (2**63 - 1)
    sampling = {
        name: getattr(body, name) for name in SamplingOptions.__annotations__ if name in type(body).model_fields
    }
    if greedy:
        sampling |= {"do_sample": False, "temperature": None, "top_p": None}
    options: Options = {
        **cast(Options, sampling),
        "guidance": body.guidance,
        "seed": seed,
        "max_new_tokens": max_tokens,
        "stop": list(stop),
    }
    least = 0
    if isinstance(body, s.Writing):
        least = model.engine.max_length if body.ignore_eos else body.min_tokens or 0
    if column is None:
        request = model.request(prompt, "text", 1 if greedy else n, **options)
    else:
        request = model.requests([prompt], column, 1 if greedy else n, **options)[0]
    return replace(request, n=n, first_sample=first, min_new_tokens=least)


def clamp_max_tokens(model: PlaitModel, max_tokens: int | None) -> int | None:
    """How many tokens may be written: no more than the model has room for, whatever a client asks for."""
    return None if max_tokens is None else max(min(max_tokens, model.engine.max_length), 1)


def stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop texts as a tuple, from one, several or none."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def text_column(model: PlaitModel, column: str | None) -> str | None:
    """Where a text is written: the column asked for, else the first of a model that reads media and knows records, not
    conversations; None continues."""
    if column is not None or (model.checkpoint.model.media and not model.vocabulary.turns):
        return model.column(column, "text", "write text")
    return None


def finish_of(finish: str) -> str:
    """OpenAI's finish_reason for how a completion ended."""
    return "length" if finish == "length" else "stop"


async def constraint_of(
    service: Service, served: Served, body: s.Writing, use: ToolUse | None = None, samples: int = 1
) -> TextConstraint | None:
    """What each of so many texts must be, compiled in a thread within COMPILE_SECONDS. Raises ApiError for what cannot
    be used."""
    constraints = dict(_constraints(body))
    if not constraints and use is None:
        return None
    if len(constraints) > 1:
        raise ApiError(400, f"A text has one constraint, not {' and '.join(constraints)}. Leave all but one out.")
    name, value = next(iter(constraints.items()), ("", None))
    if isinstance(value, str) and name == "schema":
        value = parse_json(value.encode(), service.limits)
    if use is not None and name not in ("", "schema"):
        raise ApiError(400, f"A reply that may call tools can be held to a schema, not to a {name}. Leave one out.")
    if use is not None and name and not isinstance(value, dict):
        raise ApiError(400, "A JSON schema is an object.", "response_format")
    model = served.engine_model

    def work() -> TextConstraint | None:
        if use is None:
            constraint = model.constraint(**{name: value})
        else:
            grammar = use.grammar(served, value if name else None)
            constraint = None if grammar is None else model.constraints.calls(grammar)
        return constraint and constraint.prepare(samples)

    await asyncio.to_thread(lambda: model.constraints)  # reads the vocabulary, once
    param = "tools" if use is not None else "response_format"
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise ApiError(400, "The schema or grammar takes too long to compile. Simplify it.", param) from None
    except PlaitError as error:
        raise ApiError(400, str(error), param) from error


def _constraints(body: s.Writing) -> Iterator[tuple[str, Any]]:
    """What a request holds its text to, in the spellings of OpenAI, vLLM and llama.cpp: (schema, regex, choice or
    grammar, its value)."""
    form, structured = body.response_format, body.structured_outputs or s.StructuredOutputs()
    if (form is not None and form.type == "json_object") or structured.json_object:
        yield "schema", {"type": "object"}
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format json_schema needs json_schema: {schema: ...}.", "response_format")
        yield "schema", form.json_schema.schema_
    for name, values in (
        ("schema", (structured.json_, body.guided_json, body.json_schema)),
        ("regex", (structured.regex, body.guided_regex)),
        ("choice", (structured.choice, body.guided_choice)),
        ("grammar", (structured.grammar, body.guided_grammar, body.grammar)),
    ):
        yield from ((name, value) for value in values if value)


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage, from the tokens that were read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def voice_of(service: Service, request_context: RequestContext, model: PlaitModel, voice: str | None) -> str:
    """The audio column to speak in; of OpenAI's voices each is the first one."""
    columns = [column for column, kind in model.columns.items() if kind in written_by(Verb.SPEAK)]
    if voice in VOICES and voice not in columns:
        service.ignore("voice", request_context)
        voice = None
    if voice not in (None, "default", *columns):
        raise ApiError(400, f"There is no voice '{voice}'. Use default or {', '.join(columns)}.", "voice")
    return model.column(voice if voice in columns else None, "audio", "speak")


def check_ids(model: PlaitModel, ids: list[int]) -> None:
    """Ids of special tokens are no text: they are refused as their spellings are."""
    text = model.checkpoint.text
    special = {id for id, token in text.tokenizer.get_added_tokens_decoder().items() if token.special}
    if special_ids := [id for id in ids if id >= min(text.size, model.vocabulary.text) or id in special]:
        raise PlaitError(f"The id {special_ids[0]} stands for no text in this model. Use those of its tokenizer.")


def check_read(tokens: int) -> None:
    """Raises ApiError where a request that is read in windows has too many tokens."""
    if tokens > READ_AT_ONCE:
        raise ApiError(413, f"The inputs take {tokens} tokens; at most {READ_AT_ONCE} are read at once. Send fewer.")


# --- models and state -------------------------------------------------------------------------------------------


def _card(served: Served) -> dict[str, Any]:
    plait_model = served.model.plait_model
    return a.ModelCard(
        id=served.name, created=served.created, verbs=served.verbs, columns=plait_model.columns if plait_model else {},
        max_length=plait_model.engine.max_length if plait_model else None,
    ).model_dump()  # fmt: skip


@router.get("/v1/models", response_model=a.ModelList, tags=["models"])
async def list_models(request: Request) -> Response:
    """The models that are served, and what each can do."""
    service, _ = service_of(request)
    cards = [_card(served) for served in service.models.values()]
    cards += [{**_card(service.models[model]), "id": alias} for alias, model in service.aliases.items()]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{model:path}", response_model=a.ModelCard, tags=["models"])
async def show_model(request: Request, model: str) -> Response:
    """One model."""
    service, request_context = service_of(request)
    return JSONResponse(_card(service.find(model, request_context)))


@router.get("/", response_model=a.Welcome, tags=["state"])
async def welcome(request: Request) -> Response:
    """What is served here, and where it is described."""
    service, _ = service_of(request)
    body = {
        "name": "plait", "version": dist.VERSION, "models": list(service.models), "models_url": "/v1/models",
        "openapi_url": "/openapi.json", "documentation": dist.docs_page("how-to/serving"),
        "page": "none; plait serve --ui has one here",
    }  # fmt: skip
    return JSONResponse(body)


@router.get("/health", response_model=a.Health, tags=["state"])
async def health(request: Request) -> Response:
    """Whether requests are taken. Needs no key."""
    service, _ = service_of(request)
    alive = all(served.worker.thread.is_alive() for served in service.models.values())
    if not alive:
        raise ApiError(503, "A model's thread has ended. Restart the server.", code="unhealthy")
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=PlainTextResponse, tags=["state"])
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format."""
    service, _ = service_of(request)
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# --- embeddings and classification --------------------------------------------------------------------------------


async def _embedded(
    service: Service, served: Served, request_context: RequestContext, inputs: list[Any], where: str
) -> Any:
    """The vectors (N, E) of texts, ids or parts."""
    ids = {i: value for i, value in enumerate(inputs) if isinstance(value, list)}
    texts_and_parts = [value for value in inputs if not isinstance(value, list)]
    deadline = service.deadline(request_context)
    read_values = iter(await service.parts(served.model, texts_and_parts, where, deadline))
    values = [ids[i] if i in ids else next(read_values) for i in range(len(inputs))]
    size = sum(len(value) for value in values if isinstance(value, str | list))
    model = served.model
    if (plait_model := model.plait_model) is not None:
        if "embed" not in model.verbs:
            raise ApiError(400, f"{served.name} has no embedding space. It can {', '.join(model.verbs)}.", "model")

        def prepare() -> list[list[Sequence]]:
            prompts = []
            for value in values:
                if isinstance(value, list):
                    check_ids(plait_model, value)
                    if len(value) > plait_model.engine.max_length:
                        raise PlaitError(
                            f"{len(value)} ids; this model reads {plait_model.engine.max_length}. Send fewer."
                        )
                    prompts.append([Sequence().read_ids(value, "text")])
                else:
                    prompts.append(windows(plait_model, value))
            return prompts

        parts = await service.prepared(prepare, size)
        request_context.prompt_tokens = sum(len(sequence) for part in parts for sequence in part)
        check_read(request_context.prompt_tokens)
        vectors = await served.worker.call(lambda: plait_model.embed_parts(parts), deadline)
    elif ids:
        raise ApiError(400, f"{served.name} takes texts, not ids. Send strings.", where)
    else:
        vectors = await served.worker.call(lambda: model.embed_inputs(values), deadline)
    return vectors


@router.post("/v1/embeddings", response_model=a.EmbeddingList, tags=["read"])
async def embeddings(request: Request, body: s.EmbeddingRequest) -> Response:
    """The place of each input in the model's one space. Beside texts, inputs may be parts as messages have them:
    `{"type": "image_url", ...}`, `{"type": "input_audio", ...}`."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    inputs: list[Any] = [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else body.input
    vectors = await _embedded(service, served, request_context, inputs, "input")
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
        message = f"The embeddings of {served.name} have {vectors.shape[1]} dimensions. Leave dimensions out."
        raise ApiError(400, message, "dimensions")
    if body.encoding_format == "base64":
        rows: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    else:
        rows = [row.tolist() for row in vectors]
    usage = {"prompt_tokens": request_context.prompt_tokens, "total_tokens": request_context.prompt_tokens}

    def written() -> bytes:
        # A vector at a time, so that other threads are not kept waiting by thousands of them.
        data = (json.dumps({"object": "embedding", "index": i, "embedding": row}) for i, row in enumerate(rows))
        head = json.dumps({"object": "list", "model": served.name, "usage": usage})
        return f'{head[:-1]}, "data": [{", ".join(data)}]}}'.encode()

    return Response(await asyncio.to_thread(written), media_type="application/json")


@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank", response_model=a.Reranked, tags=["read"])
async def rerank(request: Request, body: s.RerankRequest) -> Response:
    """Documents by how near they are to a query in the model's embedding space, nearest first."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    documents = [one.text if isinstance(one, s.Document) else one for one in body.documents]
    vectors = await _embedded(service, served, request_context, [body.query, *documents], "documents")
    scores = vectors[1:] @ vectors[0]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": float(scores[i])} for i in order]
    if body.return_documents:
        for result in results:
            document = documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document.model_dump()
    tokens = request_context.prompt_tokens
    return JSONResponse({
        "id": "rerank-" + secrets.token_hex(12), "model": served.name, "results": results,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 0}},
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })  # fmt: skip


@router.post("/v1/plait/classify", response_model=a.Classification | a.Classifications, tags=["read"])
async def classify(request: Request, body: s.ClassifyRequest) -> Response:
    """The likeliest labels of an input, or of each of several, with their probabilities among the labels."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    if (body.input is None) == (body.inputs is None):
        raise ApiError(400, "Send `input` for one input or `inputs` for several, one of the two.", "input")
    if (size := sum(map(len, body.labels or []))) > service.limits.label_bytes:
        max_bytes = service.limits.label_bytes
        raise ApiError(413, f"The labels have {size} characters; at most {max_bytes} are read. Send fewer.", "labels")
    _check_asked(served, body)
    if body.inputs is not None:
        results = await _classify_each(service, served, request_context, body, body.inputs)
        return JSONResponse({"object": "list", "model": served.name, "results": results})
    parts: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    values = await service.parts(served.model, parts, "input", service.deadline(request_context))
    ranked = await _classified(service, served, request_context, body, values)
    return JSONResponse({"object": "list", "model": served.name, **_classification(ranked)})


def _check_asked(served: Served, body: s.ClassifyRequest) -> None:
    """Raises ApiError where a text is sent to a run that names media alone, or several media as the parts of one input
    of a run whose records have one of them."""
    if (model := served.model.plait_model) is None:
        return
    where = "input" if body.inputs is None else "inputs"
    several: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    parts = several if body.inputs is None else body.inputs
    names = {"image": "image_url", "audio": "input_audio"}
    has_text = any(isinstance(part, str | s.TextPart) for part in parts)
    if has_text and body.labels is None and (kinds := model.media_classified):
        wanted = " or ".join(names.get(kind, kind) for kind in kinds)
        raise ApiError(
            400, f"{served.name} names {' and '.join(kinds)} files, not texts, and files are not known by their paths: "
            f"send the content, as a part of type {wanted}.", where,
        )  # fmt: skip
    for kind, part_class in (("image", s.ImagePart), ("audio", s.AudioPart)) if body.inputs is None else ():
        count = sum(isinstance(part, part_class) for part in parts)
        columns = list(model.columns.values()).count(kind)
        if 0 < columns < count:
            raise ApiError(
                400, f"A list is the parts of one input, and a record of {served.name} has {columns} of kind {kind}, "
                f"not {count}. Send several inputs as `inputs`.", where,
            )  # fmt: skip


async def _classify_each(
    service: Service, served: Served, request_context: RequestContext, body: s.ClassifyRequest, inputs: list[Any]
) -> list[dict[str, Any]]:
    """The answers to several inputs, each alone, by their place."""
    values = await service.parts(served.model, inputs, "inputs", service.deadline(request_context))
    results, tokens = [], 0
    for number, value in enumerate(values):
        ranked = await _classified(service, served, request_context, body, [value])
        tokens += request_context.prompt_tokens
        results.append({"index": number, **_classification(ranked)})
    request_context.prompt_tokens = tokens
    return results


async def _classified(
    service: Service, served: Served, request_context: RequestContext, body: s.ClassifyRequest, values: list[Any]
) -> Predictions:
    """The labels of one input, of one or several parts."""
    deadline, model = service.deadline(request_context), served.model
    if (plait_model := model.plait_model) is not None:

        def prepare() -> list[Sequence]:
            return [plait_model.context(values)] if len(values) > 1 else windows(plait_model, values[0])

        sequences = await service.prepared(prepare, sum(len(value) for value in values if isinstance(value, str)))
        request_context.prompt_tokens = sum(map(len, sequences))
        check_read(request_context.prompt_tokens)

        def work() -> Predictions:
            return plait_model.classify_parts(sequences, body.labels, body.column, body.top)
    else:
        if len(values) > 1:
            raise ApiError(
                400, f"{served.name} classifies one input at a time. Send one part, or several `inputs`.", "input"
            )

        def work() -> Predictions:
            return model.classify_inputs(values, body.labels, body.column, body.top)[0]

    return await served.worker.call(work, deadline)


def _classification(ranked: Predictions) -> dict[str, Any]:
    """Labels with their probabilities, and whether any fits."""
    return {
        "data": [prediction._asdict() for prediction in ranked],
        "none_of_these": ranked.none_of_these, "ood_score": ranked.ood_score, "chosen": ranked.chosen,
    }  # fmt: skip
