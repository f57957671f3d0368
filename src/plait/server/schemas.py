"""What requests and answers hold: OpenAI's fields, and ours under names of their own. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

AudioFormat = Literal["wav", "flac", "mp3", "opus", "pcm"]


class Strict(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _only(*values: object, instead: str) -> AfterValidator:
    """A field of OpenAI's that has no effect here is taken at these values alone."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError(f"is not supported; {instead}")
        return value

    return AfterValidator(check)


Zero = Annotated[float | None, _only(0, instead="leave it out or send 0; repetition_penalty is")]
Seed = Annotated[int | None, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=4)]
Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Drawing(Strict):
    """How ids are chosen. Nothing given: the likeliest for a single text, sampling for media."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None


# --- parts of messages ------------------------------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    url: Annotated[str, Field(description="A data: URL. Nothing is fetched.")]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    data: Annotated[str, Field(description="Base64.")]
    format: Literal["wav", "flac", "mp3", "ogg", "opus"]


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=256)]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts | None = None
    name: Annotated[str | None, _only(instead="say who speaks in the content")] = None
    images: Annotated[list[ImagePart], Field(max_length=8)] | None = None
    refusal: Annotated[str | None, _only(instead="leave it out")] = None
    audio: Annotated[Any, _only(instead="send the audio again as an input_audio part")] = None
    tool_calls: Annotated[Any, _only([], instead="leave it out")] = None
    annotations: Annotated[Any, _only([], instead="leave it out")] = None
    function_call: Annotated[Any, _only(instead="leave it out")] = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, _only(False, instead="leave it out")] = None


class ResponseFormat(Strict):
    type: Annotated[str, _only("text", instead='the only response_format is {"type": "text"}')]
    json_schema: Any = None


class AudioOut(Strict):
    voice: Name | None = None
    format: AudioFormat = "wav"


# --- requests ---------------------------------------------------------------------------------------------------


class Writing(Drawing):
    """What chat and completions share."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Count | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any] | None, _only({}, instead="leave it out")] = None
    user: Annotated[str, Field(max_length=512, description="Has no effect.")] | None = None
    column: Annotated[Name | None, Field(description="Ours: the text column to write.")] = None

    @model_validator(mode="after")
    def _streaming(self) -> Writing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self


class ChatRequest(Writing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    modalities: Annotated[list[Literal["text", "image", "audio"]], Field(min_length=1, max_length=3)] | None = None
    audio: AudioOut | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _only(0, instead="logprobs: true gives those of the ids chosen")] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any] | None, _only([], instead="no model here calls tools; leave it out")] = None
    tool_choice: Annotated[Any, _only("none", "auto", instead="no model here calls tools; leave it out")] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="Has no effect.")] = None
    store: Annotated[bool | None, _only(False, instead="nothing is stored here; leave it out")] = None
    metadata: Annotated[dict[str, str], Field(max_length=16, description="Has no effect.")] | None = None
    service_tier: Annotated[str | None, _only("auto", "default", instead="leave it out")] = None

    @model_validator(mode="after")
    def _one_spelling(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: send max_completion_tokens alone")
        if self.modalities is not None and len(set(self.modalities)) < len(self.modalities):
            raise ValueError("modalities names one twice")
        return self


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=65_536)]


class CompletionRequest(Writing):
    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1, max_length=16)] | Annotated[
        list[Ids], Field(min_length=1, max_length=16)
    ]  # fmt: skip
    echo: bool | None = None
    logprobs: Annotated[int | None, _only(0, instead="0 gives the log probabilities of the ids chosen")] = None
    best_of: Annotated[int | None, _only(1, instead="ask for n instead")] = None
    suffix: Annotated[str | None, _only("", instead="leave it out")] = None


class EmbeddingRequest(Strict):
    model: Name
    input: Text | Ids | Annotated[
        list[Text | Part | Ids], Field(min_length=1, max_length=256, description="Texts, ids, or ours: media parts.")
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Annotated[str, Field(max_length=512, description="Has no effect.")] | None = None


class ImageRequest(Drawing):
    model: Name
    prompt: Text
    n: Count | None = None
    size: Annotated[str | None, Field(max_length=32)] = None
    response_format: Annotated[str | None, _only("b64_json", instead="images come as b64_json")] = None
    output_format: Annotated[str | None, _only("png", instead="images come as png")] = None
    quality: Annotated[str | None, _only("auto", "standard", instead="leave it out")] = None
    background: Annotated[str | None, _only("auto", instead="leave it out")] = None
    stream: bool | None = None
    partial_images: Annotated[int | None, _only(0, instead="leave it out: images come whole")] = None
    user: Annotated[str, Field(max_length=512, description="Has no effect.")] | None = None
    column: Name | None = None


class SpeechRequest(Drawing):
    model: Name
    input: Text
    voice: Annotated[Name, Field(description="An audio column of the model, or default.")] = "default"
    response_format: AudioFormat = "mp3"
    speed: Annotated[float | None, _only(1, instead="leave it out")] = None
    instructions: Annotated[str | None, _only("", instead="leave it out")] = None
    stream_format: Literal["audio", "sse"] = "audio"


class TranscriptionRequest(BaseModel):
    """A multipart form."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    file: UploadFile
    model: Name
    language: Annotated[str | None, Field(max_length=64, description="A text column, or a language of Whisper's.")] = (
        None
    )
    response_format: Literal["json", "text"] = "json"
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    prompt: Annotated[str | None, _only("", instead="leave it out")] = None
    seed: Seed = None


class ClassifyRequest(Strict):
    model: Name
    input: Text | Part | Parts
    labels: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=1024)] | None = None
    column: Name | None = None
    top: Annotated[int, Field(ge=1, le=1024)] = 5


class SearchRequest(Strict):
    model: Name
    input: Text | Part
    k: Annotated[int, Field(ge=1, le=100)] = 10
    where: Annotated[
        dict[Name, Name | Annotated[list[Name], Field(min_length=1, max_length=64)]] | None,
        Field(max_length=8, description="Column -> the text, or texts, that it must hold."),
    ] = None
    by: Literal["auto", "vector", "words", "hybrid"] = "auto"
    index: Annotated[Name | None, Field(description="The index's name; the model's first where left out.")] = None
    preview: Annotated[bool, Field(description="Whether small images and audio clips come along as data: URLs.")] = True


class ExplainRequest(Strict):
    """Why a text is the answer to an input. `answer` defaults to the model's own."""

    model: Name
    input: Text | Part | Parts
    answer: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    labels: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=256)] | None = None
    column: Name | None = None
    method: Literal["occlusion", "integrated-gradients", "logit-lens"] = "occlusion"
    steps: Annotated[int, Field(ge=2, le=1024)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    image: Annotated[bool, Field(description="Send the marked input as a data: URL too.")] = False


# --- answers ----------------------------------------------------------------------------------------------------


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
    refusal: None = None


class AudioData(BaseModel):
    id: str
    data: str
    expires_at: int
    transcript: str


class Reply(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    images: list[ImagePart] | None = None
    audio: AudioData | None = None


class ChatChoice(BaseModel):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


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
    token_logprobs: list[float]
    top_logprobs: None = None
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


class EmbeddingData(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingData]
    usage: ReadUsage


class ImageData(BaseModel):
    b64_json: str


class ImageList(BaseModel):
    created: int
    data: list[ImageData]
    output_format: Literal["png"] = "png"
    size: str
    usage: dict[str, Any]


class Transcription(BaseModel):
    text: str


class LabelChance(BaseModel):
    label: str
    probability: float


class Classification(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[LabelChance]


class Found(BaseModel):
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
    data: list[Found]


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
