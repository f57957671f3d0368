"""The bodies of answers, as OpenAI has them and, of our own, beside; see `schemas.py` for those of requests."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from plait.server.schemas import ImagePart


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Fault


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "plait"
    verbs: list[str]
    columns: dict[str, str]
    max_length: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReadUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Any]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: str | None = None


class AudioData(BaseModel):
    id: str
    data: str
    expires_at: int
    transcript: str


class MadeFunctionCall(BaseModel):
    name: str
    arguments: str


class MadeCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: MadeFunctionCall


class Reply(BaseModel):
    role: Literal["assistant"] = "assistant"
    tool_calls: list[MadeCall] | None = None
    content: str | None
    refusal: str | None = None
    images: list[ImagePart] | None = None
    audio: AudioData | None = None


class ChatChoice(BaseModel):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    prompt: str


class EmbeddingData(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingData]
    usage: ReadUsage


class Ranked(BaseModel):
    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class Reranked(BaseModel):
    """`relevance_score` is the cosine of the embeddings."""

    id: str
    model: str
    results: list[Ranked]
    meta: dict[str, Any]
    usage: ReadUsage


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class ImageList(BaseModel):
    created: int
    data: list[ImageData]
    output_format: Literal["png"] = "png"
    size: str
    usage: dict[str, Any]


class TranscriptionSegment(BaseModel):
    id: int
    start: float
    end: float
    text: str


class TranscriptionWord(BaseModel):
    word: str
    start: float
    end: float


class Transcription(BaseModel):
    """The text; with `verbose_json` also when what was said, in seconds."""

    text: str
    task: str | None = None
    language: str | None = None
    duration: float | None = None
    segments: list[TranscriptionSegment] | None = None
    words: list[TranscriptionWord] | None = None


class LabelChance(BaseModel):
    label: str
    probability: float


class Classification(BaseModel):
    """The likeliest labels. `none_of_these` says that the input is unlike all that was learnt; `ood_score`, in [0, 1],
    is the share of validation records that look more familiar; null where that was not calibrated. `chosen` are, of a
    column where a record has several labels, those that hold; each probability is then of that label alone."""

    object: Literal["list"] = "list"
    model: str
    data: list[LabelChance]
    none_of_these: bool
    ood_score: float | None
    chosen: list[str] | None = None


class ClassifiedInput(BaseModel):
    """The answer to one of several inputs, as that to a single one."""

    index: int
    data: list[LabelChance]
    none_of_these: bool
    ood_score: float | None
    chosen: list[str] | None = None


class Classifications(BaseModel):
    """The answers to `inputs`, in their order."""

    object: Literal["list"] = "list"
    model: str
    results: list[ClassifiedInput]


class SearchHit(BaseModel):
    id: str
    kind: Literal["image", "audio", "text"]
    source: str
    similarity: float | None
    score: float
    text: str | None
    columns: dict[str, str]
    preview: str | None


class SearchResults(BaseModel):
    object: Literal["list"] = "list"
    model: str
    index: str
    data: list[SearchHit]


class Unit(BaseModel):
    where: str
    weight: float


class ExplainedPart(BaseModel):
    kind: str
    weights: list[float]
    words: list[str] | None = None
    column: str | None = None
    grid: list[int] | None = None
    strongest: list[Unit]


class Explained(BaseModel):
    object: Literal["explanation"] = "explanation"
    model: str
    method: str
    answer: str
    measure: str
    score: float
    chance: float
    parts: list[ExplainedPart]
    lost_without: dict[str, float]
    layers: list[dict[str, Any]]
    warnings: list[str]
    areas: dict[str, float] | None = None
    completeness_gap: float | None = None
    steps: int | None = None
    image: str | None = None


class Health(BaseModel):
    status: str


class Welcome(BaseModel):
    """What is at `/` where no page is."""

    name: str
    version: str
    models: list[str]
    models_url: str
    openapi_url: str
    documentation: str
    page: str
