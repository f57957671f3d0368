"""Conversations as prompts: by the chat template that a model brings, or as a plain transcript."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from PIL import Image as PILImage

from plait.chat.template import ROLES, Template
from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.inference.model import Model, Options
from plait.modalities.media import sniff
from plait.model.multimodal import Sequence

NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool",
         "function": "Tool"}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one side said: `role` is one of NAMES; parts are inputs as `Model` takes them."""

    role: str
    parts: list[Any]


@dataclass(frozen=True)
class Prompt:
    """A context to write after. `stop` are strings that end a reply; `strip`, whether it begins with a stray space."""

    context: Sequence
    stop: tuple[str, ...] = ()
    strip: bool = False


class Chat:
    """Turns conversations into prompts of one model."""

    def __init__(self, model: Model, folder: Path | None = None) -> None:
        """`folder` holds the checkpoint, where it is not the one that the model was loaded from: a chat template there
        is used. Raises PlaitError where it needs transformers and they are not installed."""
        folder = folder or model.folder
        self.model = model
        self.template: Template | None = None
        self.stop: tuple[str, ...] = ()
        own = bool(model.vocabulary.turns)
        if folder is not None and not own and (tokenizer := _template(folder)) is not None:
            self.template = Template(model.checkpoint.text, tokenizer)
            self.stop = _ends(folder, tokenizer, model.vocabulary.end_id)

    @property
    def column(self) -> str | None:
        """Where a reply is written by default: nowhere in particular in a model of conversations or of text alone, else
        in the first text column."""
        if self.model.vocabulary.turns or not self.model.checkpoint.model.media:
            return None
        return self.model.column(None, "text", "write text")

    def prompt(self, turns: list[Turn], column: str | None = None) -> Prompt:
        """The conversation up to the next reply; `column` names where it is to be written, None continues the text.

        A model that was trained on conversations knows the tokens of their turns; an imported one may bring a template.
        A lone message of another model that reads media is read as it is: it knows records, not conversations.
        Otherwise the transcript is "User: ...", "Assistant: ..." line by line.
        """
        if self.model.vocabulary.turns:
            return Prompt(self._turns(turns, column))
        if self.template is not None:
            return Prompt(self._templated(turns, column), self.stop)
        if len(turns) == 1 and self.model.checkpoint.model.media:
            return Prompt(self.model.context(turns[0].parts, column))
        parts: list[Any] = []
        for turn in turns:
            for part in (f"{NAMES[turn.role]}: ", *turn.parts, "\n"):
                if isinstance(part, str) and parts and isinstance(parts[-1], str):
                    parts[-1] += part
                else:
                    parts.append(part)
        parts = [*parts[:-1], parts[-1] + "Assistant:"]
        return Prompt(self.model.context(parts, column), ("\nUser:",), strip=True)

    def _turns(self, turns: list[Turn], column: str | None) -> Sequence:
        """By the tokens of the model's own turns."""
        vocabulary, sequence = self.model.vocabulary, Sequence()
        for turn in turns:
            said = self.model.context(turn.parts)
            sequence.read_ids([vocabulary.opener(ROLES[turn.role])]).extend(said).read_ids([vocabulary.end])
        sequence.read_ids([vocabulary.opener("assistant")])
        return sequence if column is None else sequence.read_ids([vocabulary.opener(column)])

    def _templated(self, turns: list[Turn], column: str | None) -> Sequence:
        assert self.template is not None
        if any(not isinstance(part, str) for turn in turns for part in turn.parts):
            raise PlaitError("This model's chat template takes text only. Leave images and audio clips out.")
        messages = [(turn.role, "\n".join(turn.parts)) for turn in turns]
        sequence = Sequence().read_ids(self.template.ids(messages), "text")
        return sequence if column is None else sequence.read_ids([self.model.vocabulary.opener(column)])


def _template(folder: Path) -> Any:
    """The tokenizer of a folder that brings a chat template, as transformers loads it; None where there is none."""
    settings = folder / "tokenizer_config.json"
    known = settings.is_file() and read_json(settings).get("chat_template")
    if not known and not (folder / "chat_template.jinja").is_file():
        return None
    transformers = import_extra("transformers", "huggingface", f"The chat template of {folder}")
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, split_special_tokens=False
        )
    except Exception as error:  # its loaders raise nearly every class on damaged files
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise PlaitError(f"{folder}: the tokenizer's settings cannot be read: {reason}. Fetch it again.") from error
    return tokenizer if tokenizer.chat_template else None


def _ends(folder: Path, tokenizer: Any, known: int | None) -> tuple[str, ...]:
    """The spellings of further ids that end a reply: the engine knows one."""
    found = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            end = read_json(folder / name).get("eos_token_id")
            found += end if isinstance(end, list) else [end]
    ids = sorted({id for id in found if isinstance(id, int) and id != known})
    return tuple(name for name in tokenizer.convert_ids_to_tokens(ids) if name)


class Session:
    """A conversation that goes on: what was said, what is attached to the next message, and replies as they come."""

    def __init__(self, chat: Chat, system: str | None = None) -> None:
        self.chat, self.model = chat, chat.model
        self.turns: list[Turn] = [Turn("system", [system])] if system else []
        self.attached: list[Path] = []
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
        said = ""
        for update in self.model.engine.stream(request):
            piece = update.text if said or not prompt.strip else update.text.lstrip()
            said += piece
            if piece:
                yield piece
        self._keep(message, said)

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

    def _keep(self, message: Turn, said: Any) -> None:
        self.turns += [message, Turn("assistant", [said])]
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
    encoded = base64.b64encode(data).decode()
    if kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": form}}
    return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{encoded}"}}
