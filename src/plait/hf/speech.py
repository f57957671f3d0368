"""Whisper as transformers runs it: language and task, recordings of any length, and when what was said."""

from __future__ import annotations

from collections.abc import Callable
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

    def segments(self, wave: np.ndarray, language: str | None, task: str) -> list[Segment]:
        """What is said when. Raises PlaitError where the model does not tell times."""
        if not self.tells_times:
            raise PlaitError(f"{self.name} does not tell times. Use a Whisper whose generation_config.json has them.")
        options = self._options(language, task, None)
        return [] if silent(wave) else self._segments(wave, options)

    def _options(self, language: str | None, task: str, max_new_tokens: int | None) -> dict[str, Any]:
        if task not in TASKS:
            raise PlaitError(f"There is no task '{task}'. Whisper can {' and '.join(TASKS)}.")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
        if getattr(self.settings, "is_multilingual", False):
            return options | {"task": task} | ({} if language is None else {"language": language})
        if language is not None or task != "transcribe":
            raise PlaitError(f"{self.name} knows one language only. Leave the language out.")
        return options

    def _inputs(self, wave: np.ndarray, whole: bool = False) -> Any:
        """Features; `whole` ones are as long as the recording."""
        more: dict[str, Any] = {"truncation": False, "padding": "longest"} if whole else {}
        return self.features(
            wave, sampling_rate=self.features.sampling_rate, return_attention_mask=True, return_tensors="pt", **more
        )

    def _segments(self, wave: np.ndarray, options: dict[str, Any]) -> list[Segment]:
        long = len(wave) > SECONDS * self.features.sampling_rate
        with torch.random.fork_rng():
            torch.manual_seed(0)  # higher temperatures draw
            result = self._generate(self._inputs(wave, whole=long), options | LONG_FORM | {"return_segments": True})
        found = []
        for segment in result["segments"][0]:
            text = self.tokenizer.decode(segment["tokens"], skip_special_tokens=True).strip()
            if text:
                found.append(Segment(float(segment["start"]), float(segment["end"]), text))
        return found

    def _generate(self, inputs: Any, options: dict[str, Any]) -> Any:
        def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            pause_point()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with quiet():
            try:
                return self.run(self.model.generate, **inputs, **options, stopping_criteria=[stop])
            except ValueError as error:  # a language that it does not have
                raise PlaitError(f"{self.name}: {' '.join(str(error).split())[:300]}") from error
