"""The same from Python and the shell: lines to copy for what a model can do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.server.page_parts import SNIPPETS, SnippetCall


@dataclass(frozen=True)
class Snippet:
    """Lines that do one thing.

    Attributes:
        verb: What it does, as models name it.
        python: By the library.
        curl: By a server of the model at ADDRESS, with a KEY.
    """

    verb: str
    python: str
    curl: str


@dataclass(frozen=True)
class Sample:
    """An input in the lines to copy: in Python, and as a server is sent it."""

    python: str
    body: Any


SAMPLES = {
    "image": Sample("photo.jpg", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]),
    "audio": Sample("clip.wav", [{"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}]),
    "text": Sample("a text", "a text"),
}


def _reading(sample: Sample) -> list[SnippetCall]:
    """Calls that say something about an input."""
    message = [{"role": "user", "content": sample.body}]
    return [
        SnippetCall("classify", f'model.classify("{sample.python}")', "/v1/plait/classify", {"input": sample.body}),
        SnippetCall("describe", f'model.describe("{sample.python}")', "/v1/chat/completions", {"messages": message}),
    ]


CALLS = (
    SnippetCall("draw", 'model.draw("red circle", n=4)', "/v1/images/generations", {"prompt": "red circle", "n": 4}),
    SnippetCall("speak", 'model.speak("hello")', "/v1/audio/speech", {"input": "hello", "response_format": "wav"}),
    SnippetCall("generate", 'model.generate("Once upon")', "/v1/completions", {"prompt": "Once upon"}),
    SnippetCall("embed", 'model.embed("a text")', "/v1/embeddings", {"input": "a text"}),
)  # fmt: skip
HEADERS = '-H "Authorization: Bearer KEY" -H "Content-Type: application/json"'


def snippets(run: Path, verbs: list[str], kinds: Sequence[str]) -> list[Snippet]:
    """Lines for each verb of a run's model.

    Args:
        run: The run's folder.
        verbs: What its model can do.
        kinds: Of what it reads, by column; a medium goes before a text.
    """
    own = [call for call in SNIPPETS.all() if call.applies is not None and call.applies(run)]
    kind = next((one for one in kinds if one in SAMPLES and one != "text"), "text")
    others = [*_reading(SAMPLES[kind]), *CALLS, *(call for call in SNIPPETS.all() if call.applies is None)]
    return [_rendered(call, run) for call in own or others if call.applies is not None or call.verb in verbs]


def _rendered(call: SnippetCall, run: Path) -> Snippet:
    body = json.dumps({"model": run.name, **call.body})
    opened = f"model = plait.load({str(run)!r})" if call.applies is None else f"run = {str(run)!r}"
    python = f"import plait\n\n{opened}\nprint({call.python})\n"
    return Snippet(call.verb, python, f"curl ADDRESS{call.path} {HEADERS} -d '{body}'")
