"""What models can do, as tools of the Model Context Protocol: for assistants that call tools by themselves.

A tool is there where some model can do what it says. Media come as base64 or as files within the folders that were
given, nowhere else; media that are found or made go back as content.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import soundfile
from pydantic import Field

from plait.core.dist import VERSION, import_extra
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.inference.base import Model, Verb
from plait.inference.decisions import Option, Question
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import encode_png
from plait.modalities.media import Checker, media_type, sniff
from plait.server.limits import ApiError, Limits, decode_base64
from plait.server.media import PATIENCE

Text = Annotated[str | None, Field(description="A text as the input.", max_length=1_000_000)]
File = Annotated[str | None, Field(description="A file as the input: a path within the folders that are served.")]
Data = Annotated[str | None, Field(description="An image or audio clip as the input: its file, as base64.")]
Name = Annotated[str | None, Field(description="Which model, where there are several.")]
Count = Annotated[int, Field(ge=1, le=50)]


@dataclass(frozen=True)
class McpTool:
    """A tool that assistants may call.

    Attributes:
        name: What it is called by.
        available: Whether anything of a toolbox has a use for it.
        build: The function behind it, over a toolbox. Its arguments are the tool's, its docstring says what it does.
        structured: Whether the answer is an object; else it is a list of texts and media.
    """

    name: str
    available: Callable[[Toolbox], bool]
    build: Callable[[Toolbox], Callable[..., Any]]
    structured: bool = True


MCP_TOOLS: ExtensionPoint[McpTool] = ExtensionPoint("mcp_tool")


@dataclass
class Toolbox:
    """Models and indexes, and what of them is offered. One call runs at a time.

    Attributes:
        models: By name.
        indexes: By name; each finds by `search(query, k)`.
        folders: Where files may be read.
    """

    models: dict[str, Model]
    indexes: dict[str, Any] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.folders = [folder.expanduser().resolve() for folder in self.folders]
        self._checker = Checker(self.limits.media, PATIENCE)
        self._lock = threading.Lock()

    def close(self) -> None:
        self._checker.close()

    def models_with(self, verb: str) -> list[str]:
        """The models that can do something."""
        return [name for name, model in self.models.items() if verb in model.offered_verbs]

    def model(self, name: str | None, verb: str) -> Model:
        """The model of a name that can do something; the first where none is named."""
        able = self.models_with(verb)
        if name is None:
            return self.models[able[0]]
        if name not in able:
            raise PlaitError(f"'{name[:80]}' is no model that can {verb}. Use {', '.join(able)}.")
        return self.models[name]

    def value(self, text: str | None, file: str | None, data: str | None) -> Any:
        """The one input that was given, decoded in a process of its own. Raises PlaitError."""
        if sum(one is not None for one in (text, file, data)) != 1:
            raise PlaitError("Give one input: text, file or data.")
        if text is not None:
            return text
        if file is not None:
            encoded = self._bytes(file)
        else:
            try:
                encoded = decode_base64(data or "", self.limits, "data")
            except ApiError as error:
                raise PlaitError(error.message) from None
        kind = (sniff(encoded[:64]) or ("",))[0]
        if not kind:
            raise PlaitError("The input is no image and no audio clip that is read.")
        try:
            return self._checker.decode(kind, encoded)
        except MediaError as error:
            raise PlaitError(f"The {kind} cannot be used: {error}.") from None

    def _bytes(self, file: str) -> bytes:
        """A file of the folders that may be read, links followed. Raises PlaitError."""
        for folder in self.folders:
            path = (folder / file).resolve()
            if path.is_relative_to(folder) and path.is_file():
                if path.stat().st_size > self.limits.media.file_bytes:
                    raise PlaitError(f"The file is larger than {self.limits.media.file_bytes // 1_000_000} MB.")
                return path.read_bytes()
        raise PlaitError("There is no such file in the folders that may be read. Start with --folder DIR to add one.")

    def run(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            return work()


def build_server(toolbox: Toolbox, name: str = "Plait") -> Any:
    """The server of the protocol over a toolbox. Raises PlaitError where the package is missing."""
    import_extra("mcp", "mcp", "The Model Context Protocol")
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    described = "; ".join(f"{known}: {_says(model)}" for known, model in toolbox.models.items())
    server = MCPServer(name, instructions=f"Models of Plait. {described}"[:4000], version=VERSION)
    for tool in _tools(toolbox):
        call = tool.build(toolbox)
        server.add_tool(_with_tool_errors(call, ToolError), name=tool.name, description=call.__doc__,
                        structured_output=tool.structured)  # fmt: skip
    return server


def _says(model: Model) -> str:
    """What a model can do and knows, in a few words."""
    labels = [f"{column} ({', '.join(values[:20])})" for column, values in model.labels.items() if values]
    return f"can {', '.join(model.offered_verbs)}" + (f", knows {'; '.join(labels)}" if labels else "")


def _with_tool_errors(call: Callable[..., Any], error_type: type[Exception]) -> Callable[..., Any]:
    """A tool whose own errors reach the client; the signature, from which its schema is made, stays."""
    import functools

    @functools.wraps(call)
    def call_tool(**arguments: Any) -> Any:
        try:
            return call(**arguments)
        except PlaitError as error:
            raise error_type(str(error)) from None

    return call_tool


def _tools(box: Toolbox) -> list[McpTool]:
    """The tools that the models have a use for. Raises PlaitError where there is none."""
    tools = [tool for tool in (*TOOLS, *MCP_TOOLS.all()) if tool.available(box)]
    if not tools:
        raise PlaitError("None of the models can do anything that is offered here. Serve a run or an index.")
    return tools


def _classify(box: Toolbox) -> Callable[..., dict[str, Any]]:
    def classify(
        text: Text = None, file: File = None, data: Data = None,
        labels: Annotated[list[str] | None, Field(description="To choose between; else the learnt ones.")] = None,
        column: Annotated[str | None, Field(description="The column of labels to answer in.")] = None,
        top: Count = 5, model: Name = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The likeliest labels of a text, image or audio clip, with probabilities, and whether none of them fits."""
        value = box.value(text, file, data)
        chosen = box.model(model, "classify")
        prediction = box.run(lambda: chosen.classify_inputs([value], labels, column, top)[0])
        ranked = [{"label": label, "probability": round(chance, 6)} for label, chance in prediction]
        return {"labels": ranked, "none_of_these": prediction.none_of_these, "ood_score": prediction.ood_score}

    return classify


def _decide(box: Toolbox) -> Callable[..., dict[str, Any]]:
    def decide(
        question: Annotated[str, Field(description="'Is it a three?', or what to choose.", max_length=4096)],
        options: Annotated[list[str] | None, Field(description="To choose between; none: yes or no.")] = None,
        text: Text = None, file: File = None, data: Data = None, model: Name = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A typed question about a text, image or audio clip, answered by calibrated probabilities, or refused."""
        value = box.value(text, file, data)
        chosen = box.model(model, "classify")
        kind: Literal["choice", "predicate"] = "choice" if options else "predicate"
        asked_question = Question(kind, question, tuple(Option(option) for option in options or []), "question")
        decision = box.run(lambda: chosen.decide(value, [asked_question])[0])
        names = options or ["yes", "no"]
        chances = {n: round(chance, 6) for n, chance in zip(names, decision.probabilities, strict=False)}
        return {"probabilities": chances, "refusal": decision.refusal or None, "calibrated": decision.calibrated,
                "column": decision.column, "ood_score": decision.ood_score}  # fmt: skip

    return decide


def _transcribe(box: Toolbox) -> Callable[..., dict[str, Any]]:
    def transcribe(
        file: File = None, data: Data = None,
        times: Annotated[bool, Field(description="Whether to say when what was said.")] = False,
        language: Annotated[str | None, Field(description="Spoken there, as en; found out if left out.")] = None,
        model: Name = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The words of an audio clip, with times where asked for."""
        value = box.value(None, file, data)
        chosen = box.model(model, "transcribe")
        if not times:
            return {"text": box.run(lambda: chosen.transcribe(value, language=language))}
        segments = [asdict(one) for one in box.run(lambda: chosen.segments(value, language=language))]
        return {"text": " ".join(one["text"] for one in segments), "segments": segments}

    return transcribe


def _caption(box: Toolbox) -> Callable[..., dict[str, Any]]:
    def caption(file: File = None, data: Data = None, model: Name = None) -> dict[str, Any]:
        """What an image shows, in words."""
        value = box.value(None, file, data)
        chosen = box.model(model, "describe")
        return {"text": box.run(lambda: chosen.describe(value))}

    return caption


def _generate(box: Toolbox) -> Callable[..., list[Any]]:
    def generate(
        prompt: Annotated[str, Field(max_length=100_000)],
        to: Annotated[Literal["text", "image", "audio"], Field(description="What to make.")] = "text",
        max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256,
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0,
        schema: Annotated[dict[str, Any] | None, Field(description="A JSON schema that a text must follow.")] = None,
        model: Name = None,
    ) -> list[Any]:
        """A text that goes on from a prompt, or an image or audio clip of what it says."""
        verb = {"text": "generate", "image": "draw", "audio": "speak"}[to]
        if not box.models_with(verb):
            raise PlaitError(f"No model here can {verb}.")
        chosen: Any = box.model(model, verb)
        if verb == Verb.DRAW:
            return [image_content(encode_png(box.run(lambda: chosen.draw(prompt, seed=seed))[0]))]
        if verb == Verb.SPEAK:
            wave, rate = box.run(lambda: chosen.speak(prompt, seed=seed))[0]
            out = io.BytesIO()
            soundfile.write(out, wave, rate, format="WAV", subtype="PCM_16")
            return [audio_content(out.getvalue())]
        options = {} if schema is None else {"schema": schema}
        return [box.run(lambda: chosen.generate(prompt, max_new_tokens=max_tokens, seed=seed, **options))]

    return generate


def for_verb(verb: str) -> Callable[[Toolbox], bool]:
    """Whether some model of a toolbox can do this."""
    return lambda box: bool(box.models_with(verb))


TOOLS = (
    McpTool("classify", for_verb(Verb.CLASSIFY), _classify),
    McpTool("decide", for_verb(Verb.CLASSIFY), _decide),
    McpTool("transcribe", for_verb(Verb.TRANSCRIBE), _transcribe),
    McpTool("caption", for_verb(Verb.DESCRIBE), _caption),
    McpTool("generate", for_verb(Verb.GENERATE), _generate, structured=False),
)


def image_content(data: bytes) -> Any:
    """An image file, as a tool's answer has it."""
    from mcp.server.mcpserver import Image

    return Image(data=data, format=media_type(data).partition("/")[2])


def audio_content(data: bytes) -> Any:
    """An audio file, as a tool's answer has it."""
    from mcp.server.mcpserver import Audio

    return Audio(data=data, format=media_type(data).partition("/")[2])
