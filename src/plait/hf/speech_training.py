"""Whisper trained further on clips of one's own: `plait train DATA --init-from WHISPER`, where DATA has audio with what
is said in it.

The encoder stays as it is: its states of each clip are made once and kept in the run's folder, in 16 bit, and the
layers of the decoder learn the transcripts by teacher forcing. Shapes: B records a step, S states of a clip of 30 s,
H their width, L tokens of a transcript.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.core.config import TrainingRecipe
from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json
from plait.core.interruption import pause_point
from plait.data.dataset import Dataset
from plait.hf import hub
from plait.hf.further import FurtherTraining, Progress
from plait.hf.pretrained import kind_of
from plait.hf.speech import SECONDS
from plait.modalities.audio_files import AUDIO, decode_audio, resample
from plait.model.adapted import weight_sums
from plait.training.build import label_columns
from plait.training.tasks import find_task

ENCODED = 4  # clips that the encoder reads at once
ASKED = 16  # clips whose language is listened for
IGNORED = -100  # target of a place that is not learned


def trains_speech(dataset: Dataset, name: str, task: str) -> bool:
    """Whether a dataset's clips with transcripts are for the speech model `name`: where its texts are no labels, or
    the recipe's `task` is to describe them."""
    try:
        if kind_of(hub.find(name)) != "speech" or dataset.manifest.kind != "records":
            return False
    except PlaitError:
        return False
    if {"audio", "text"} - set(dataset.columns.values()):
        return False
    return "describe" in (task, find_task(dataset, label_columns(dataset, 2**31)))


def train_speech(
    dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """Train the model `name`, or go on with the run in `folder`; what to tell of it.

    Raises PlaitError for parts that cannot be frozen and too few clips. KeyboardInterrupt and Terminated are raised
    once the run was saved.
    """
    training = SpeechTraining(dataset, folder, name, facts, recipe, device, progress)
    return [*training.left_out, *training.run()]


def speech_columns(dataset: Dataset) -> tuple[str, str]:
    """(the column of audio, that of what is said). Raises PlaitError where several texts could be meant."""
    audio = next(column for column, kind in dataset.columns.items() if kind == AUDIO.kind)
    texts = [column for column, kind in dataset.columns.items() if kind == "text"]
    labels = label_columns(dataset, 2**31)
    chosen = [column for column in texts if column not in labels] or texts
    if len(chosen) > 1:
        raise PlaitError(
            f"{dataset.path} has several columns of text: {', '.join(chosen)}. Keep the one with what is said: "
            f"plait prepare --map {chosen[1]}=ignore."
        )
    return audio, chosen[0]


class Clips:
    """The clips of a split that have a transcript and fit into what Whisper reads at once: the ids of what is said, and
    the encoder's states, (N, S, H) in 16 bit, mapped from a file."""

    def __init__(self, ids: list[list[int]], states: np.ndarray) -> None:
        self.ids, self.states = ids, states

    def __len__(self) -> int:
        return len(self.ids)


class SpeechTraining(FurtherTraining):
    """A run that trains the decoder of a Whisper."""

    score_name, peak, batch_size, epochs = "likelihood", 5e-5, 8, 5

    def __init__(
        self, dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str,
        progress: Progress,
    ) -> None:  # fmt: skip
        super().__init__(folder, name, facts, recipe, device, progress)
        if unknown := [part for part in recipe.freeze if part != "encoder"]:
            raise PlaitError(f"Of {name} the encoder alone can be frozen, and always is, not {unknown[0]}.")
        self.audio, self.text = speech_columns(dataset)
        self.left_out: list[str] = []  # lines for people
        self.train, self.val = (self._clips(dataset, split, name) for split in ("train", "val"))
        if len(self.train) < 2:
            raise PlaitError(f"{dataset.path} has {len(self.train)} clips with transcripts in train; two are needed.")
        self.prefix = self._prefix()
        self._freeze()
        self.begin(len(self.train))

    def _freeze(self) -> None:
        """The layers of the decoder are trained; its table of tokens, which is its output layer too, is not."""
        self.network.requires_grad_(False)
        self.network.model.decoder.layers.requires_grad_(True)
        self.network.model.decoder.layer_norm.requires_grad_(True)

    # --- data -------------------------------------------------------------------------------------------------------

    def _clips(self, dataset: Dataset, split: str, name: str) -> Clips:
        """Of a split; the encoder's states of it are made where they are not in the run's folder."""
        indices = dataset.indices(split)
        texts = dataset.texts(self.text)
        longest = self.network.config.max_target_positions - 8
        ids = {
            int(i): self.model.tokenizer(" " + str(texts[i]).strip(), add_special_tokens=False)["input_ids"]
            for i in indices if texts[i]
        }  # fmt: skip
        fitting = [i for i, one in ids.items() if len(one) <= longest]
        states, kept = self._states(dataset, split, fitting, name)
        if len(kept) < len(indices):
            self.left_out.append(
                f"{len(indices) - len(kept)} of {len(indices)} clips of {split} are left out: without a transcript, "
                f"longer than {SECONDS} s, or with one of more than {longest} tokens."
            )
        return Clips([ids[i] for i in kept], states)

    def _states(self, dataset: Dataset, split: str, indices: list[int], name: str) -> tuple[np.ndarray, list[int]]:
        """The encoder's states of clips (N, S, H), and which clips those are: none is longer than Whisper reads."""
        cache = self.folder / "cache"
        config = self.network.config
        key = _key(name, dataset, self.text)
        states_file, kept_file = cache / f"states-{split}-{key}.f16", cache / f"states-{split}-{key}.json"
        shape = (config.max_source_positions, config.d_model)
        if not kept_file.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            kept: list[int] = []
            with states_file.open("wb") as file:
                records = dataset.iterate(np.array(indices, np.int64), [self.audio])
                waves: list[np.ndarray] = []
                for done, (index, record) in enumerate(zip(indices, records, strict=True)):
                    if (wave := self._wave(record.parts.get(self.audio))) is not None:
                        waves.append(wave)
                        kept.append(index)
                    if waves and (len(waves) == ENCODED or done == len(indices) - 1):
                        file.write(self._encoded(waves).tobytes())
                        waves = []
                        self.progress(f"states of {split}", done + 1, len(indices))
            write_json(kept_file, kept)
        kept = read_json(kept_file)
        if not kept:
            return np.zeros((0, *shape), np.float16), []
        return np.memmap(states_file, np.float16, "r", shape=(len(kept), *shape)), kept

    def _wave(self, value: Any) -> np.ndarray | None:
        """A clip at Whisper's rate; None of what is not there or too long."""
        if value is None:
            return None
        wave, rate = decode_audio(value)
        wave = resample(wave, rate, self.model.processor.sampling_rate)
        return wave if len(wave) <= SECONDS * self.model.processor.sampling_rate else None

    def _encoded(self, waves: list[np.ndarray]) -> np.ndarray:
        """(N, S, H) float16."""
        pause_point()
        features = self.model.processor(
            waves, sampling_rate=self.model.processor.sampling_rate, return_tensors="pt"
        ).input_features
        with torch.inference_mode(), self.model.device.autocast():
            states = self.network.model.encoder(features.to(self.model.device.torch)).last_hidden_state
        return np.asarray(states.float().cpu().numpy(), np.float16)

    def _prefix(self) -> list[int]:
        """The ids that a transcript begins with: the mark of the start, and of a model of several languages the one
        that the first clips are mostly in. The model keeps that as its own."""
        settings = self.network.generation_config
        prefix = [self.network.config.decoder_start_token_id]
        if getattr(settings, "is_multilingual", False):
            if self.newest is None:
                from transformers.modeling_outputs import BaseModelOutput

                states = torch.from_numpy(np.array(self.train.states[:ASKED], np.float32))
                tokens = self.network.detect_language(
                    encoder_outputs=BaseModelOutput(states.to(self.model.device.torch)), generation_config=settings
                ).tolist()
                token = Counter(tokens).most_common(1)[0][0]
                by_id = {number: word for word, number in settings.lang_to_id.items()}
                settings.language, settings.task = by_id[token].strip("<|>"), "transcribe"
            prefix += [settings.lang_to_id[f"<|{settings.language}|>"], settings.task_to_id["transcribe"]]
        if getattr(settings, "no_timestamps_token_id", None) is not None:
            prefix.append(settings.no_timestamps_token_id)
        return [int(one) for one in prefix]

    # --- steps ------------------------------------------------------------------------------------------------------

    def loss(self, places: np.ndarray, step: int) -> Tensor:
        """Mean of -log P of what is said, over its tokens."""
        return self._loss(self.train, places)

    def _loss(self, clips: Clips, places: Sequence[int] | np.ndarray) -> Tensor:
        end = self.network.config.eos_token_id
        rows = [[*self.prefix, *clips.ids[place], end] for place in places]
        longest = max(len(row) for row in rows) - 1
        read = torch.full((len(rows), longest), end)
        targets = torch.full((len(rows), longest), IGNORED)
        for number, row in enumerate(rows):
            read[number, : len(row) - 1] = torch.tensor(row[:-1])
            targets[number, len(self.prefix) - 1 : len(row) - 1] = torch.tensor(row[len(self.prefix) :])
        device = self.model.device.torch
        states = torch.from_numpy(np.array(clips.states[np.asarray(places)], np.float32)).to(device)
        with self.model.device.autocast():
            hidden = self.network.model.decoder(
                input_ids=read.to(device), encoder_hidden_states=states, use_cache=False
            ).last_hidden_state
            learned = targets.flatten() != IGNORED
            logits = self.network.proj_out(hidden.flatten(0, 1)[learned.to(device)])
        return nn.functional.cross_entropy(logits.float(), targets.flatten()[learned].to(device))

    @property
    def validated(self) -> int:
        """Clips of val."""
        return len(self.val)

    def score(self) -> float:
        """The mean of log P over the transcripts of val, by batches; 0 where val is empty."""
        self.network.eval()
        losses = []
        with torch.inference_mode():
            for start in range(0, len(self.val), self.batch_size):
                losses.append(-float(self._loss(self.val, range(start, min(start + self.batch_size, len(self.val))))))
        return float(np.mean(losses)) if losses else 0.0

    def describe(self, config: dict[str, Any]) -> str:
        """What a checkpoint goes by, for people."""
        return describe_speech(config)


def _key(name: str, dataset: Dataset, text: str) -> str:
    """By which states are known: the content of model and data."""
    content = [weight_sums(hub.find(name)), [shard.sha256 for shard in dataset.manifest.shards], text]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def describe_speech(config: dict[str, Any]) -> str:
    """What a checkpoint goes by, and how it reads unseen clips, for people."""
    training = config["training"]
    unseen = "nothing was held out"
    if training["records"]:
        unseen = f"loss on {training['records']} clips of val {-training['validation']['likelihood']:.3f} nats a token"
    return f"whisper from {training['init_from']}, {training['step']} steps on clips with what is said; {unseen}."
