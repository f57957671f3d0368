"""What requests hold: OpenAI's fields, and ours under names of their own; `answers.py` has what is answered.

A field that is not declared here has no effect: it is taken, and named in the header `x-plait-ignored` (with `--strict`
it is refused). Inside messages and parts such fields are dropped. `null` is as if a field were not there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

AudioFormat = Literal["wav", "flac", "mp3", "opus", "pcm"]
# Fields of OpenAI's that say who asks or how an answer is kept, and may be sent to a strict server too.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


def _without_null(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Inner(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    _null = model_validator(mode="before")(_without_null)


class Body(BaseModel):
    """A request. `model_extra` holds what has no effect."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    _null = model_validator(mode="before")(_without_null)

    model: Annotated[str, Field(max_length=256)] | None = None


def _only(*values: object, instead: str) -> AfterValidator:
    """A field whose other values would change what an answer means, and are not known here."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError(f"is not supported; {instead}")
        return value

    return AfterValidator(check)


def _off_below_zero(value: Any) -> Any:
    """Some servers write -1 for "no bound"."""
    return None if value == -1 and not isinstance(value, bool) else value


Seed = Annotated[int | None, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=4)]
Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = Annotated[int | None, Field(ge=0, le=2**31), BeforeValidator(_off_below_zero)]


class SamplingBody(Body):
    """How ids are chosen. Nothing given: the likeliest for a single text, sampling for media."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed = None
    top_k: Annotated[int | None, Field(ge=0, le=1_000_000), BeforeValidator(_off_below_zero)] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_a: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        """llama.cpp's name of the penalty."""
        if isinstance(value, dict) and "repeat_penalty" in value and "repetition_penalty" not in value:
            value = dict(value)
            value["repetition_penalty"] = value.pop("repeat_penalty")
        return value


# --- parts of messages ------------------------------------------------------------------------------------------


class TextPart(Inner):
    type: Literal["text"]
    text: Text


class ImageUrl(Inner):
    url: Annotated[str, Field(description="A data: URL. Nothing is fetched.")]


class ImagePart(Inner):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Inner):
    data: Annotated[str, Field(description="Base64.")]


class AudioPart(Inner):
    type: Literal["input_audio"]
    input_audio: InputAudio


def _one_spelling(value: Any) -> Any:
    """A part as chat completions write it: the Responses API, Anthropic's messages and Ollama have other spellings."""
    if not isinstance(value, dict):
        return value
    kind, image = value.get("type"), value.get("image_url")
    if kind in ("input_text", "output_text"):
        return {**value, "type": "text"}
    if kind == "refusal":
        return {"type": "text", "text": value.get("refusal")}
    if kind == "input_image" or (kind == "image_url" and isinstance(image, str)):
        return {"type": "image_url", "image_url": {"url": image} if isinstance(image, str) else image}
    source = value.get("source")
    if kind == "image" and isinstance(source, dict):
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {"type": "image_url", "image_url": {"url": url if source.get("type") == "base64" else source.get("url")}}
    return value


Part = Annotated[
    Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")], BeforeValidator(_one_spelling)
]
Parts = Annotated[list[Part], Field(min_length=1, max_length=256)]


class FunctionCall(Inner):
    name: Name
    arguments: Annotated[Text, Field(description="JSON.")] = ""


class CalledTool(Inner):
    id: Annotated[str, Field(max_length=256)] = ""
    function: FunctionCall


class Message(Inner):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(max_length=256)] | None = None
    images: Annotated[list[ImagePart], Field(max_length=8)] | None = None
    tool_calls: Annotated[list[CalledTool] | None, Field(max_length=64)] = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class FunctionTool(Inner):
    name: Name
    description: Text = ""
    parameters: Annotated[dict[str, Any], Field(description="A JSON schema of the arguments.")] = {}
    strict: Annotated[bool, Field(description="Refuse keywords of the schema that cannot be held.")] = False


def _one_tool(value: Any) -> Any:
    """A tool as chat completions write it: the Responses API and Anthropic's messages have it flat."""
    if not isinstance(value, dict) or "function" in value:
        return value
    if "input_schema" in value:
        value = {**value, "parameters": value["input_schema"], "type": "function"}
    return {"type": "function", "function": value} if value.get("type", "function") == "function" else value


class ToolSpec(Inner):
    type: Annotated[str, Field(max_length=64)] = "function"
    function: Annotated[FunctionTool | None, Field(description="Other types of tools have no effect.")] = None


Tools = Annotated[list[Annotated[ToolSpec, BeforeValidator(_one_tool)]], Field(max_length=256)]


class StreamOptions(Inner):
    include_usage: bool | None = None


class JsonSchema(Inner):
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}


class ResponseFormat(Inner):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Inner):
    """vLLM's way to hold a text to something."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=4096)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class AudioOut(Inner):
    voice: Name | None = None
    format: AudioFormat = "wav"


# --- requests ---------------------------------------------------------------------------------------------------


class Writing(SamplingBody):
    """What chat and completions share."""

    max_tokens: Tokens = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    ignore_eos: bool | None = None
    n: Count | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    grammar: Annotated[str | None, Field(description="In Lark's or llama.cpp's notation.")] = None
    json_schema: Annotated[dict[str, Any] | None, Field(description="llama.cpp's spelling.")] = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    column: Annotated[Name | None, Field(description="Ours: the text column to write.")] = None


class ChatRequest(Writing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    modalities: Annotated[list[Literal["text", "image", "audio"]], Field(min_length=1, max_length=3)] | None = None
    audio: AudioOut | None = None
    max_completion_tokens: Tokens = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1, max_length=65_536)]


class CompletionRequest(Writing):
    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1, max_length=16)] | Annotated[
        list[Ids], Field(min_length=1, max_length=16)
    ]  # fmt: skip
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20, description="So many likeliest tokens at each place.")] = None


class TokenizeRequest(Body):
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    tokens: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(max_length=65_536)]


class EmbeddingRequest(Body):
    input: Text | Ids | Annotated[
        list[Text | Part | Ids], Field(min_length=1, max_length=2048, description="Texts, ids, or ours: media parts.")
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class Document(Inner):
    text: Text


class RerankRequest(Body):
    """As Cohere and Jina have it."""

    query: Text | Part
    documents: Annotated[list[Text | Document | Part], Field(min_length=1, max_length=1024)]
    top_n: Annotated[int, Field(ge=1, le=1024)] | None = None
    return_documents: bool | None = None


class ImageRequest(SamplingBody):
    prompt: Text
    n: Count | None = None
    size: Annotated[str | None, Field(max_length=32)] = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool | None = None
    column: Name | None = None


class SpeechRequest(SamplingBody):
    input: Text
    voice: Annotated[Name, Field(description="An audio column of the model, or default.")] = "default"
    response_format: AudioFormat = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"


class TranscriptionRequest(Body):
    """A multipart form."""

    file: UploadFile
    language: Annotated[str | None, Field(max_length=64, description="A text column, or a language of Whisper's.")] = (
        None
    )
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    timestamp_granularities: Annotated[
        list[Literal["segment", "word"]] | None,
        Field(alias="timestamp_granularities[]", max_length=2, description="With verbose_json: `word` adds words."),
    ] = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Seed = None


class ClassifyRequest(Body):
    """Exactly one of `input` and `inputs`."""

    input: Annotated[Text | Part | Parts | None, Field(description="One input; a list is its parts.")] = None
    inputs: Annotated[
        list[Text | Part] | None, Field(min_length=1, max_length=256, description="Several, each answered by itself.")
    ] = None
    labels: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=1024)] | None = None
    column: Name | None = None
    top: Annotated[int, Field(ge=1, le=1024)] = 5


class SearchRequest(Body):
    input: Text | Part
    k: Annotated[int, Field(ge=1, le=100)] = 10
    where: Annotated[
        dict[Name, Name | Annotated[list[Name], Field(min_length=1, max_length=64)]] | None,
        Field(max_length=8, description="Column -> the text, or texts, that it must hold."),
    ] = None
    by: Literal["auto", "vector", "words", "hybrid"] = "auto"
    index: Annotated[Name | None, Field(description="The index's name; the model's first where left out.")] = None
    preview: Annotated[bool, Field(description="Whether small images and audio clips come along as data: URLs.")] = True


class ExplainRequest(Body):
    """Why a text is the answer to an input. `answer` defaults to the model's own."""

    input: Text | Part | Parts
    answer: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    labels: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=256)] | None = None
    column: Name | None = None
    method: Literal["occlusion", "integrated-gradients", "logit-lens"] = "occlusion"
    steps: Annotated[int, Field(ge=2, le=1024)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    image: Annotated[bool, Field(description="Send the marked input as a data: URL too.")] = False
