"""Whisper as transformers runs it: language and task, recordings of any length, and when what was said."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.core.errors import PlaitError
from plait.core.interruption import pause_point
from plait.hf.hub import quiet
from plait.inference.results import Segment
from plait.modalities.audio_files import silent

SECONDS = 30  # of audio that Whisper reads at once
FRAME, GAP = 0.02, 0.2  # seconds that loudness is measured over; of silence that no word has in it
QUIET = 0.05  # loudness, of a word's loudest frame, below which it is taken for silence
TASKS = ("transcribe", "translate")
# As OpenAI's own program decodes what is long: what looks wrong is written anew at a higher temperature, and what is
# no speech is left out.
LONG_FORM: dict[str, Any] = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "condition_on_prev_tokens": False,
    "return_timestamps": True,
}


class Speech:
    """A Whisper with its feature extractor and tokenizer."""

    def __init__(self, name: str, model: Any, features: Any, tokenizer: Any, run: Callable[..., Any]) -> None:
        """`run` calls a function of the model on its device."""
        self.name, self.model, self.features, self.tokenizer, self.run = name, model, features, tokenizer, run

    @property
    def settings(self) -> Any:
        """The generation settings that transformers keeps with the model."""
        return self.model.generation_config

    @property
    def tells_times(self) -> bool:
        """Whether the model has tokens for times, without which long recordings are cut every 30 seconds."""
        return getattr(self.settings, "no_timestamps_token_id", None) is not None

    def text(self, wave: np.ndarray, language: str | None, task: str, max_new_tokens: int | None) -> str:
        """The words of a waveform at the model's rate."""
        options = self._options(language, task, max_new_tokens)
        if silent(wave):
            return ""
        if self.tells_times and len(wave) > SECONDS * self.features.sampling_rate:
            return " ".join(segment.text for segment in self._segments(wave, options))
        step = SECONDS * self.features.sampling_rate
        texts = []
        for start in range(0, len(wave), step):
            ids = self._generate(self._inputs(wave[start : start + step]), options)
            texts.append(self.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
        return " ".join(text for text in texts if text)

    def segments(self, wave: np.ndarray, language: str | None, task: str, words: bool = False) -> list[Segment]:
        """What is said when, with `words` by word too. Raises PlaitError where the model does not tell times."""
        if not self.tells_times:
            raise PlaitError(f"{self.name} does not tell times. Use a Whisper whose generation_config.json has them.")
        if words and getattr(self.settings, "alignment_heads", None) is None:
            raise PlaitError(
                f"{self.name} does not tell when each word is said: its generation_config.json has no alignment_heads. "
                "Leave words out."
            )
        options = self._options(language, task, None)
        return [] if silent(wave) else self._segments(wave, options, words)

    def _options(self, language: str | None, task: str, max_new_tokens: int | None) -> dict[str, Any]:
        if task not in TASKS:
            raise PlaitError(f"There is no task '{task}'. Whisper can {' and '.join(TASKS)}.")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
        if getattr(self.settings, "is_multilingual", False):
            return options | {"task": task} | ({} if language is None else {"language": language})
        if language is not None or task != "transcribe":
            raise PlaitError(f"{self.name} knows one language only. Leave the language out.")
        return options

    def _inputs(self, wave: np.ndarray, untruncated: bool = False) -> Any:
        """Features; `untruncated` ones are as long as the recording."""
        more: dict[str, Any] = {"truncation": False, "padding": "longest"} if untruncated else {}
        return self.features(
            wave, sampling_rate=self.features.sampling_rate, return_attention_mask=True, return_tensors="pt", **more
        )

    def _segments(self, wave: np.ndarray, options: dict[str, Any], words: bool = False) -> list[Segment]:
        long = len(wave) > SECONDS * self.features.sampling_rate
        options = options | LONG_FORM | {"return_segments": True} | ({"return_token_timestamps": True} if words else {})
        with torch.random.fork_rng(), self._attention_kept():
            torch.manual_seed(0)  # higher temperatures draw
            result = self._generate(self._inputs(wave, untruncated=long), options)
        segments = []
        for segment in result["segments"][0]:
            text = self.tokenizer.decode(segment["tokens"], skip_special_tokens=True).strip()
            if text:
                start, end = float(segment["start"]), float(segment["end"])
                words_said = self._words(segment) if words else ()
                tight = tuple(tightened(word, wave, self.features.sampling_rate) for word in words_said)
                segments.append(Segment(start, end, text, tight))
        return segments

    def _words(self, segment: dict[str, Any]) -> tuple[Segment, ...]:
        """The words of a segment. Cross-attention tells of each token when it ends, which is when the next begins."""
        ids, ends = segment["tokens"].tolist(), segment["token_timestamps"].tolist()
        start, pieces = float(segment["start"]), list[Segment]()
        pending_ids: list[int] = []  # ids whose bytes are no whole characters yet
        for token, end in zip(ids, ends, strict=False):
            text = self.tokenizer.decode([*pending_ids, token], skip_special_tokens=True)
            if text.endswith("\ufffd"):
                pending_ids.append(token)
                continue
            pending_ids.clear()
            if text:
                pieces.append(Segment(start, end, text))
            start = end
        return tuple(joined_words(pieces))

    @contextlib.contextmanager
    def _attention_kept(self) -> Iterator[None]:
        """transformers goes over to slower attention, for good, where times of tokens are asked for; not here."""
        config = self.model.model.config
        implementation = config._attn_implementation
        try:
            yield
        finally:
            config._attn_implementation = implementation

    def _generate(self, inputs: Any, options: dict[str, Any]) -> Any:
        def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            pause_point()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with quiet():
            try:
                return self.run(self.model.generate, **inputs, **options, stopping_criteria=[stop])
            except ValueError as error:  # a language that it does not have
                raise PlaitError(f"{self.name}: {' '.join(str(error).split())[:300]}") from error


def joined_words(pieces: Iterable[Segment]) -> list[Segment]:
    """Pieces of text, as tokens have them, as words: one begins at a space, and where none are written at each
    character; what is no letter stays with the word before it."""
    words: list[Segment] = []
    for piece in pieces:
        text = piece.text.strip()
        begins = piece.text[:1].isspace() or not words or (text[:1].isalnum() and _without_spaces(text[0]))
        if begins and text:
            words.append(Segment(piece.start, piece.end, text))
        elif words:
            words[-1] = Segment(words[-1].start, piece.end, words[-1].text + text)
    return words


def tightened(word: Segment, wave: np.ndarray, rate: int) -> Segment:
    """A word without the silence before and behind it, which attention counts in, nor what is heard of another word
    beyond that: frames that are not far below the loudest, without long gaps, the loudest stretch of them."""
    frame = round(FRAME * rate)
    first, last = int(word.start * rate) // frame, -(-int(word.end * rate) // frame)
    part = wave[first * frame : last * frame]
    part = part[: len(part) // frame * frame].reshape(-1, frame)
    loud = np.sqrt(np.square(part, dtype=np.float32).mean(1)) if len(part) else np.zeros(0)
    if not len(loud) or not loud.max():
        return word
    heard = np.flatnonzero(loud >= QUIET * loud.max())
    stretches = np.split(heard, np.flatnonzero(np.diff(heard) > GAP / FRAME) + 1)
    heard = max(stretches, key=lambda frames: float(np.square(loud[frames]).sum()))
    start, end = (first + int(heard[0])) * FRAME, (first + int(heard[-1]) + 1) * FRAME
    return Segment(max(word.start, start), min(word.end, end), word.text)


def _without_spaces(character: str) -> bool:
    """Whether a character is of a script that writes no spaces between words: Chinese, Japanese, Thai, Lao, Burmese,
    Khmer. (Korean's are as wide and does.)"""
    return unicodedata.name(character, "").split()[0:1] in (
        ["CJK"], ["HIRAGANA"], ["KATAKANA"], ["THAI"], ["LAO"], ["MYANMAR"], ["KHMER"]
    )  # fmt: skip
