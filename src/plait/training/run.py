"""The folder of a run: what was decided once, its tokenizer and codecs, and what to tell of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes

from plait.core import isa
from plait.core.config import SIZES, Recipe, parse_recipe
from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.files import read_json, sha256_file, write_atomic, write_json
from plait.core.objective import losses_of_row, weighted_sum
from plait.core.rng import key_of
from plait.data.blocks import plan_blocks
from plait.data.conversations import turns
from plait.data.dataset import Dataset
from plait.data.stores import written_place
from plait.kernels import training as native
from plait.kernels.choice import KERNEL, PYTORCH
from plait.modalities.base import MediaModality
from plait.modalities.recogniser import Recogniser
from plait.modalities.text import Text
from plait.model.multimodal import Multimodal
from plait.training.build import label_columns
from plait.training.codec_training import train_codec
from plait.training.distributed import Group
from plait.training.encoder_curve import EncoderCurve
from plait.training.parts import Budget, begin_part, current_budget, describe_parts, first_step
from plait.training.recogniser_training import Labelled, held_out_labels, train_recogniser
from plait.training.samples import CodecSamples, EncoderSamples, SampleLog, places_shown
from plait.training.split import Split, add_codes

# Settings that a run may change as it goes: none of them changes what a step computes.
FREE = ("save_every", "keep", "keep_every", "log_records", "grad_accum_steps", "parallel", "activation_checkpointing")


Work = Literal["codec", "encoder", "model", "validation", "other"]


@dataclass
class Progress:
    """What a training run tells while it works.

    Attributes:
        stage: What is being done, for people.
        done: Units of it that are done.
        total: Units in all.
        losses: Objective -> loss in nats.
        tokens_per_second: Of training.
        note: What else there is to know.
        work: What is being done, for programs.
    """

    stage: str
    done: int
    total: int
    losses: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    note: str = ""
    work: Work = "other"


Report = Callable[[Progress], None]
StageProgress = Callable[[str, int, int, float], None]  # (modality, done, total, loss)


class Run:
    """The folder of a run and what training knows."""

    def __init__(
        self, folder: Path, dataset: Dataset, recipe: Recipe, report: Report, device: Device,
        reuse: Path | None = None, group: Group | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.dataset, self.recipe, self.device = folder, dataset, recipe, device
        self.group = group or Group()
        self.report: Report = report if self.group.is_main else lambda progress: None
        self.source = reuse or folder  # whose tokenizer, codecs and cache
        self.settings = recipe.training
        self.size = SIZES[recipe.model.size]
        self.batch_size = self.settings.batch_size or self.size.batch_size
        self.peak = self.settings.learning_rate or self.size.learning_rate
        self.samples = SampleLog(folder)
        self.metadata: dict[str, Any] = {}
        self.changed = False  # whether the recipe or the data are not those that the run began with

    @property
    def budget(self) -> Budget:
        """What the part that the run is in was given."""
        return current_budget(self.metadata, self.recipe)

    @property
    def minutes(self) -> float:
        """The time that the part has which the run is in."""
        return self.budget.minutes or self.size.minutes

    @property
    def part(self) -> int:
        """The part that the run is in, from 0."""
        return len(self.metadata.get("parts", []))

    @property
    def first_step(self) -> int:
        """Steps that were done when this part began."""
        return first_step(self.metadata)

    def record(self, **facts: Any) -> None:
        """Write down what was chosen once; on resume it is only read."""
        self.metadata.update(facts)
        if self.group.is_main:
            write_json(self.folder / "run.json", self.metadata)

    def note(self, fact: str, name: str, value: Any) -> None:
        """`decide` for one entry of a fact that holds one for each of several names."""
        self.record(**{fact: {**self.metadata.get(fact, {}), name: value}})

    def computing(self) -> dict[str, str]:
        """What decides the last bits of a step on a processor: the instructions, and what computes blocks."""
        if self.device.kind != "cpu":
            return {}
        level = isa.level()
        facts = {"instructions": level.name if level else "none", "blocks": native.backend_name(self.device)}
        if self.device.dtype is torch.float32:
            facts["products"] = KERNEL if native.multiplies() else PYTORCH
            native.multiply(facts["products"] == KERNEL)  # from here on: what is written down is what computes
        return facts

    def _same_computing(self, allow_changes: bool) -> None:
        """Refuse to go on where a step would compute otherwise than it did, unless changes are allowed."""
        began = self.metadata.get("computing") or {}
        if "products" in began and native.library() is not None:
            native.multiply(began["products"] == KERNEL)  # whatever is measured today
        now = self.computing()
        different = [name for name in began if began[name] != now.get(name)]
        if not different or "finished" in self.metadata or self.metadata["device"] != self.device.kind:
            return
        words = "; ".join(f"{name}: was {began[name]}, now {now.get(name, 'on another device')}" for name in different)
        if not allow_changes:
            remedy = "restore what it had"
            if "instructions" in different and began["instructions"] in [level.name for level in isa.supported()]:
                remedy = f"set {isa.VARIABLE}={began['instructions']}"
            raise PlaitError(
                f"{self.folder} was computed otherwise ({words}), so that it would not go on bit for bit. To go on, "
                f"{remedy}, or pass --allow-changes."
            )
        self.metadata["changes"] = [*self.metadata.get("changes", []), words]
        self.record(computing=now)
        self.report(Progress("note", 1, 1, note=f"going on with other arithmetic: {words}"))

    def open(self, allow_changes: bool = False, more: Budget | None = None) -> bool:
        """Begin or go on; True where the run had been finished, and no `more` is asked for. Refuses a folder of another
        recipe or dataset, unless changes are allowed: then what depends on them is decided anew, and they are written
        down."""
        shards = "".join(shard.sha256 for shard in self.dataset.manifest.shards)
        current: dict[str, Any] = {
            "recipe": self.recipe.model_dump(mode="json"),  # as run.json gives it back
            "dataset": written_place(self.dataset.path, self.folder),
            "data": hashlib.sha256(shards.encode()).hexdigest(),
        }
        path = self.folder / "run.json"
        if not path.exists():
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            self.record(
                **current, seed=self.settings.seed, size=self.recipe.model.size, device=self.device.kind,
                processes=self.group.size, threads=torch.get_num_threads(), computing=self.computing(),
                precision=str(self.device.dtype).removeprefix("torch."), torch=torch.__version__, started=time.time(),
            )  # fmt: skip
            return False
        self.metadata = read_json(path)
        if self.metadata["device"] == self.device.kind:
            self.device = Device(self.device.name, getattr(torch, self.metadata["precision"]))
        if self.metadata.get("processes", 1) == self.group.size:
            torch.set_num_threads(self.metadata["threads"])
        else:
            self.record(processes=self.group.size, threads=torch.get_num_threads())
        old = parse_recipe(self.metadata["recipe"], str(path)).model_dump(mode="json")
        differences = {"recipe": difference(_fixed(old), _fixed(current["recipe"])), "data": ""}
        if self.metadata["data"] != current["data"]:
            differences["data"] = f" (sha256: was {self.metadata['data'][:12]}, now {current['data'][:12]})"
        changed = {name: text for name, text in differences.items() if text}
        network = changes(_network(old), _network(current["recipe"]))
        if changed and (network or not allow_changes):
            others = changes(_fixed(old), _fixed(current["recipe"])) if "recipe" in changed else []
            raise PlaitError(_of_another(self.folder, "data" in changed, others, bool(network), allow_changes))
        if more is not None and "finished" in self.metadata:
            begin_part(self.metadata, more)
            if self.group.is_main and (figures := self.folder / "metrics.json").exists():
                figures.rename(self.folder / f"metrics-part-{self.part}.json")  # of the model as it was
            self.record()
        if changed:
            self.changed = True
            for name in ("steps", "revisions", "finished", "stopped_early"):
                self.metadata.pop(name, None)
            summary = "".join(changed.values()).strip()
            self.metadata["changes"] = [*self.metadata.get("changes", []), summary]
            self.report(Progress("note", 1, 1, note=f"going on with changes: {summary}"))
        if any(self.metadata[name] != value for name, value in current.items()):
            self.record(**current)
        self._same_computing(allow_changes)
        return "finished" in self.metadata

    def steps_from(self, number: int) -> int:
        """The length of the schedule as it stands at a step."""
        steps = self.metadata["steps"]
        for revision in self.metadata.get("revisions", []):
            if number >= revision["at"]:
                steps = revision["steps"]
        return int(steps)

    def text(self) -> Text:
        """The tokenizer: trained on the train split's texts, or read again on resume."""
        path = self.source / "tokenizer.json"
        if not path.exists():
            vocabulary = self.recipe.model.text.vocabulary or self.size.vocabulary
            Text.train(self._tokenizer_texts(), vocabulary).save(path)
        return Text.load(path)

    def _tokenizer_texts(self) -> Iterator[str]:
        """The texts of train, one after another; of a column of more than two blocks those of the first two, which are
        from all over it."""
        train = self.dataset.indices("train")
        chats = self.dataset.manifest.chats
        columns = [c for c, kind in self.dataset.columns.items() if kind == "text" and c not in chats]
        for column in [*columns, *chats]:
            plan = plan_blocks(self.dataset, "train", [column])
            records = np.sort(np.concatenate([plan.records(block) for block in range(min(plan.count, 2))]))
            for values in self.dataset.cells(column, train[records]):
                for value in values.to_pylist():
                    value = _said(value) if column in chats else value
                    if value is not None:
                        yield value

    def codecs(self, model: Multimodal, splits: dict[str, Split]) -> None:
        """Train each codec, or read it again; then encode all media."""
        anew = False
        if not self.group.is_main:  # the first process has just written down what it trained
            self.metadata = read_json(self.folder / "run.json")
        trained = (self.metadata if self.source == self.folder else read_json(self.source / "run.json")).get(
            "codecs", {}
        )
        for name, modality in model.media.items():
            if name in model.config.read_only:
                modality.codec.eval().requires_grad_(False)
                continue
            path = self.source / "codecs" / f"{name}.safetensors"
            known = trained.get(name)
            if known and path.exists():
                if known["sha256"] == sha256_file(path):
                    modality.codec.load_state_dict(load_file(path))
                    modality.codec.eval().requires_grad_(False)
                    continue
                if self.source != self.folder:
                    raise PlaitError(f"{path} was altered or cut. Go on with that run first, which mends it.")
                note = f"{path} was altered or cut; it is trained again, which makes it what it was"
                self.report(Progress("note", 1, 1, note=note))
            assert self.group.is_main
            if name in self.metadata.get("source", {}).get("codecs", []):
                self._keep_codec(name, modality, {"from": self.metadata["source"]["name"]})
                continue
            stores = [splits["train"].media[c] for c, m in self.dataset.columns.items() if m == name]
            result = train_codec(
                modality,
                stores,
                steps=self.metadata.get("codec_steps", {}).get(name) or self.settings.codec_steps,
                seconds=self.minutes * 60 * self.settings.codec_share,
                learning_rate=self.settings.codec_learning_rate,
                seed=self.settings.seed,
                record=partial(self.note, "codec_steps", name),
                progress=self._codec_progress(modality, splits),
            )
            self._keep_codec(name, modality, result)
            anew = True
        written = {c: m for c, m in self.dataset.columns.items() if m not in model.config.read_only}
        for name, split in splits.items():
            add_codes(split, written, model.media, self.source / "cache", name, anew)

    def recognisers(self, model: Multimodal, splits: dict[str, Split]) -> None:
        """Train each encoder that is a recogniser on its labels, or read it again. Only the first process trains."""
        recognising = {
            name: modality for name, modality in model.media.items() if isinstance(modality.encoder, Recogniser)
        }
        if not self.group.is_main:
            self.metadata = read_json(self.folder / "run.json")
        known = (self.metadata if self.source == self.folder else read_json(self.source / "run.json")).get(
            "recognisers", {}
        )
        for name, modality in recognising.items():
            facts = known.get(name, {})
            path = self._recogniser_file(name, facts.get("part", 0))
            is_whole = path.exists() and facts.get("sha256") == sha256_file(path)
            if is_whole:
                modality.encoder.load_state_dict(load_file(path))
                if facts.get("part", 0) == self.part:
                    continue
            if not is_whole and self.part:
                raise PlaitError(
                    f"{path} was altered or cut, so {self.folder} cannot go on from it. Put it back from a copy, or "
                    "train again into another folder."
                )
            self._train_recogniser(name, modality, splits, 1 / len(recognising), facts)

    def _recogniser_file(self, name: str, part: int) -> Path:
        suffix = f"-{part}" if part else ""
        return self.source / "recognisers" / f"{name}{suffix}.safetensors"

    def _train_recogniser(
        self, name: str, modality: MediaModality, splits: dict[str, Split], share: float, earlier: Mapping[str, Any]
    ) -> None:
        """Train an encoder on its labels for a `share` of the time of encoders, and write it down. In a later part it
        goes on from what an `earlier` one wrote; which of both is kept, val decides."""
        encoder = modality.encoder
        assert isinstance(encoder, Recogniser)
        budget = self.budget
        fixed_steps = self.settings.recogniser_steps if self.part == 0 else None
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        curve, done = EncoderCurve(), int(earlier.get("steps", 0))
        show = self._encoder_progress(modality, splits)

        def progress(stage: str, step: int, steps: int, loss: float) -> None:
            curve.add(done + step, loss)
            show(stage, step, steps, loss)

        result = train_recogniser(
            modality,
            self._labelled(name, encoder.columns, splits["train"]),
            device=self.device,
            steps=self.metadata.get("recogniser_steps", {}).get(name)
            or fixed_steps
            or budget.steps,  # where the model's are given, the encoders train for as many
            seconds=self.minutes * 60 * self.settings.recogniser_share * share,
            seed=self.settings.seed,
            record=partial(self.note, "recogniser_steps", name),
            progress=progress,
            done=done,
        )
        kept = True
        if self.part:
            held = self._labelled(name, encoder.columns, splits["val"])
            now = held_out_labels(modality, held, self.device)
            learnt = {key: value.clone() for key, value in encoder.state_dict().items()}
            encoder.load_state_dict(before)
            then = held_out_labels(modality, held, self.device)
            kept = not now.is_worse_than(then)
            if kept:
                encoder.load_state_dict(learnt)
            what = "goes on with it" if kept else "goes on with the encoder as it was"
            note = f"{name}: {now.share:.1%} right on val after more training, {then.share:.1%} before; {what}"
            self.report(Progress("note", 1, 1, note=note))
        path = self.folder / "recognisers" / self._recogniser_file(name, self.part).name
        path.parent.mkdir(exist_ok=True)
        tensors = {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()}
        write_atomic(path, tensors_to_bytes(tensors))
        curve.write(path.with_suffix(".json"))
        part = {"part": self.part, "kept": kept} if self.part else {}
        self.note("recognisers", name, {**result, **part, "sha256": sha256_file(path)})

    def restore_recognisers(self, model: Multimodal) -> None:
        """Give encoders that learnt labels what the part learnt that the run is in, after a checkpoint was restored,
        which may be of the part before. What leads from them into the backbone stays the checkpoint's."""
        for name, facts in self.metadata.get("recognisers", {}).items():
            path = self._recogniser_file(name, facts.get("part", 0))
            if "part" not in facts or not path.exists():
                continue
            learnt = {key: tensor for key, tensor in load_file(path).items() if key.startswith(("trunk.", "heads."))}
            model.media[name].encoder.load_state_dict(learnt, strict=False)

    def _codec_progress(self, modality: MediaModality, splits: dict[str, Split]) -> StageProgress:
        """What is told while a codec is trained, with what it makes of three media."""
        column = next(c for c, m in self.dataset.columns.items() if m == modality.name)
        media = (splits["val"] if len(splits["val"].media[column]) else splits["train"]).media[column]
        samples = CodecSamples(self.samples, modality, [media[i] for i in places_shown(len(media))])

        def progress(name: str, done: int, total: int, loss: float) -> None:
            self.report(Progress(f"{name} codec", done, total, {"reconstruction": loss}, work="codec"))
            samples(done, total)

        return progress

    def _encoder_progress(self, modality: MediaModality, splits: dict[str, Split]) -> StageProgress:
        """What is told while an encoder learns labels, with what it says of records of val."""
        assert isinstance(modality.encoder, Recogniser)
        columns = modality.encoder.columns
        held = self._labelled(modality.name, columns, splits["val"])
        if not (held.classes[columns[0]] >= 0).any():
            held = self._labelled(modality.name, columns, splits["train"])
        labels = label_columns(self.dataset, 2**31)[columns[0]]
        samples = EncoderSamples(self.samples, modality, held, labels)

        def progress(name: str, done: int, total: int, loss: float) -> None:
            self.report(Progress(f"{name} labels", done, total, {"labels": loss}, work="encoder"))
            samples(done, total)

        return progress

    def _labelled(self, modality: str, columns: list[str], split: Split) -> Labelled:
        """The samples of a modality's first column, and the classes of their records, in the labels' order."""
        source = next(c for c, m in self.dataset.columns.items() if m == modality)
        labels = label_columns(self.dataset, 2**31)
        places = np.flatnonzero(split.rows[source] >= 0)
        texts = list(split.texts)
        classes = {}
        for column in columns:
            number = {key_of(text) | 1: place for place, text in enumerate(labels[column])}
            keys = split.keys[places, texts.index(column)]
            class_of_sample = np.full(len(split.media[source]), -1, np.int64)
            class_of_sample[split.rows[source][places]] = [number.get(int(key), -1) for key in keys]
            classes[column] = class_of_sample
        return Labelled(split.media[source], classes)

    def _keep_codec(self, name: str, modality: MediaModality, facts: dict[str, Any]) -> None:
        path = self.folder / "codecs" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, tensors_to_bytes({k: v.contiguous() for k, v in modality.codec.state_dict().items()}))
        modality.codec.eval().requires_grad_(False)
        self.note("codecs", name, {**facts, "sha256": sha256_file(path)})


def _said(conversation: str | None) -> str | None:
    """The texts of a conversation, a line each."""
    if conversation is None:
        return None
    return "\n".join(content for turn in turns(conversation) for kind, content in turn.parts if kind == "text")


@dataclass(frozen=True)
class Change:
    """A setting of a recipe that is another one now; None is one that was left out."""

    key: str  # as "training.minutes"
    was: Any
    now: Any

    def __str__(self) -> str:
        """For people: "minutes was 1, now not given"."""
        name = self.key.rpartition(".")[2].replace("_", " ")
        was, now = ("not given" if one is None or one == {} else str(one) for one in (self.was, self.now))
        return f"{name} was {was}, now {now}"


def changes(old: Any, new: Any, where: str = "") -> list[Change]:
    """The keys in which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [one for k in {**old, **new} for one in changes(old.get(k), new.get(k), f"{where}.{k}".strip("."))]
    return [] if old == new else [Change(where, old, new)]


def difference(old: Any, new: Any) -> str:
    """The keys in which two nested dictionaries differ, with both values; "" where there are none."""
    return "".join(f" ({one.key}: was {one.was}, now {one.now})" for one in changes(old, new))


def _of_another(folder: Path, other_data: bool, settings: list[Change], other_network: bool, allowed: bool) -> str:
    """What to tell where a folder holds a run that was made of other data or by other settings, and what to do."""
    what = ["on other data"] * other_data + [f"by other settings ({'; '.join(map(str, settings))})"] * bool(settings)
    ways = f"leave it and name another folder with -o, or train it further as it began: plait train {folder} --more 5"
    if other_network:
        tail = " Its network is another one, so it cannot go on with these." if allowed else ""
    else:
        tail = " To go on with it by what is given now: --allow-changes"
    return f"{folder} holds a run that was trained {' and '.join(what)}. Two ways: {ways} (minutes).{tail}"


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe a run may not change by itself."""
    training = {name: value for name, value in recipe["training"].items() if name not in FREE}
    return {**recipe, "training": training}


def _network(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe fixes the network."""
    backbone = {name: value for name, value in recipe["model"]["backbone"].items() if name != "dropout"}
    return {"model": {**recipe["model"], "backbone": backbone}}


def describe(folder: Path) -> str:
    """What a run decided and how large its model is, for people."""
    facts = read_json(folder / "run.json")
    config = read_json(folder / "checkpoints" / "best" / "config.json")
    backbone, shown = config["backbone"], facts["decided"]
    parameters = ", ".join(f"{name} {count:,}" for name, count in shown["parameters"].items())
    notes = "".join(f"\nNote: {note}." for note in facts.get("notes", []))
    stopped = f", stopped early at {facts['stopped_early']}" if "stopped_early" in facts else ""
    steps = (facts.get("revisions") or [facts])[-1]["steps"]
    schedules = f" ({describe_parts(facts)}, a schedule each)" if "parts" in facts else ""
    return (
        f"Size {facts['size']}: width {backbone['width']}, {backbone['layers']} layers; {parameters} parameters.\n"
        f"{steps} steps{schedules} of {shown['batch_size']} records{stopped}; "
        f"learning rate {shown['learning_rate']:g}; seed {facts['seed']}; "
        f"on {facts['device']} with {facts['threads']} threads. "
        f"Best checkpoint: step {config['training']['step']} in {folder / 'checkpoints' / 'best'}{_averaged(folder)}"
        f"{notes}"
    )


def _averaged(folder: Path) -> str:
    """What an average of the weights did to validation, where there is one."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = read_json(folder / "run.json")["recipe"]["training"]["weights"]
    by_split = {}
    for row in rows:
        by_split[row["split"]] = weighted_sum(losses_of_row(row), weights)
    if "val_raw" not in by_split:
        return ""
    return f"\nAveraged weights: validation loss {by_split['val']:.4f}; the raw ones: {by_split['val_raw']:.4f}."
