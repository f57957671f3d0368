"""The same from Python and the shell: lines to copy for what a model can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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


IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]


CALLS = (
    SnippetCall("classify", 'model.classify("photo.jpg")', "/v1/plait/classify", {"input": IMAGE}),
    SnippetCall(
        "describe", 'model.describe("photo.jpg")', "/v1/chat/completions",
        {"messages": [{"role": "user", "content": IMAGE}]},
    ),
    SnippetCall("draw", 'model.draw("red circle", n=4)', "/v1/images/generations", {"prompt": "red circle", "n": 4}),
    SnippetCall("speak", 'model.speak("hello")', "/v1/audio/speech", {"input": "hello", "response_format": "wav"}),
    SnippetCall("generate", 'model.generate("Once upon")', "/v1/completions", {"prompt": "Once upon"}),
    SnippetCall("embed", 'model.embed("photo.jpg")', "/v1/embeddings", {"input": "a text"}),
)  # fmt: skip
HEADERS = '-H "Authorization: Bearer KEY" -H "Content-Type: application/json"'


def snippets(run: Path, verbs: list[str]) -> list[Snippet]:
    """Lines for each verb of a run's model."""
    rendered = []
    for call in (*CALLS, *SNIPPETS.all()):
        if call.verb in verbs:
            body = json.dumps({"model": run.name, **call.body})
            python = f"import plait\n\nmodel = plait.load({str(run)!r})\nprint({call.python})\n"
            rendered.append(Snippet(call.verb, python, f"curl ADDRESS{call.path} {HEADERS} -d '{body}'"))
    return rendered
