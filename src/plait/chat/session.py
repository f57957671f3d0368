"""A conversation with a model that goes on, message by message."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from PIL import Image as PILImage

from plait.core.errors import PlaitError
from plait.inference.prompts import Chat, Prompt, Turn
from plait.inference.sampling import Options
from plait.modalities.media import MEDIA, sniff


class Session:
    """A conversation that goes on: what was said, what is attached to the next message, and replies as they come."""

    def __init__(self, chat: Chat, system: str | None = None) -> None:
        self.chat, self.model = chat, chat.model
        self.turns: list[Turn] = [Turn("system", [system])] if system else []
        self.attached: list[Any] = []  # files, images, (samples, rate): inputs as `Model` takes them
        self.written = 0  # replies so far: each has a seed of its own
        self.left_out = 0  # turns that the last prompt had no room for

    def attach(self, path: Path, kind: str) -> None:
        """Put an image ("image") or an audio clip ("audio") beside the next message. Raises PlaitError where it cannot
        be read, or the model reads none."""
        column = self.model.column(None, kind, f"read {kind}")
        if not path.is_file():
            raise PlaitError(f"{path} does not exist.")
        self.model.context([(column, path)])
        self.attached.append(path)

    def say(self, text: str, **options: Unpack[Options]) -> Iterator[str]:
        """Yields the reply to a message piece by piece; what was attached goes along. A reply that is given up in the
        middle, and its message, are not kept."""
        message = Turn("user", [*self.attached, *([text] if text else [])])
        turns, prompt = self._fitting([*self.turns, message], self.chat.column)
        self.left_out = len(self.turns) + 1 - len(turns)
        column = self.chat.column
        options = {**self._seeded(options), "stop": list(prompt.stop)}
        if column is None:
            request = self.model.request(prompt.context, "text", **options)
        else:
            request = self.model.requests([prompt.context], column, **options)[0]
        written = ""
        for update in self.model.engine.stream(request):
            piece = update.text if written or not prompt.strip else update.text.lstrip()
            written += piece
            if piece:
                yield piece
        self._keep(message, written)

    def draw(self, text: str, **options: Unpack[Options]) -> PILImage.Image:
        """An image of what a text says, drawn as a turn of the conversation where the model knows turns."""
        column = self.model.column(None, "image", "draw")
        options = self._seeded(options)
        message = Turn("user", [text])
        if self.model.vocabulary.turns:
            _, prompt = self._fitting([*self.turns, message], column)
            sample = self.model.write([prompt.context], column, **options)[0][0]
            image: PILImage.Image = self.model.modality(column).to_object(sample)
        else:
            image = self.model.draw(text, **options)[0]
        self._keep(message, image)
        return image

    def _seeded(self, options: Options) -> Options:
        return {**options, "seed": options.get("seed", 0) + self.written}

    def _keep(self, message: Turn, reply: Any) -> None:
        self.turns += [message, Turn("assistant", [reply])]
        self.attached = []
        self.written += 1

    def _fitting(self, turns: list[Turn], column: str | None) -> tuple[list[Turn], Prompt]:
        """The turns that leave a quarter of the model's context to the reply, the oldest left out, and their prompt."""
        limit = self.model.engine.max_length
        room, first = limit - min(limit // 4, 256), int(turns[0].role == "system")
        while True:
            prompt = self.chat.prompt(turns, column)
            if len(prompt.context) <= room or len(turns) <= first + 1:
                return turns, prompt
            turns = [*turns[:first], *turns[first + 1 :]]
            while len(turns) > first + 1 and turns[first].role == "assistant":  # a conversation begins with a message
                turns = [*turns[:first], *turns[first + 1 :]]

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI's messages, media within as base64."""
        return [
            {"role": turn.role, "content": turn.parts[0] if turn.parts and isinstance(turn.parts[0], str)
             and len(turn.parts) == 1 else [_message_part(part) for part in turn.parts]}
            for turn in self.turns
        ]  # fmt: skip


def _message_part(part: Any) -> dict[str, Any]:
    """A part of a turn as OpenAI's messages have it; images become PNG where they are no file."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, PILImage.Image):
        buffer = io.BytesIO()
        part.save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data = Path(part).read_bytes()
    kind, form = sniff(data[:64]) or ("image", "png")
    return MEDIA[kind].message_part(data, form)
