"""Where a run's weights begin: at nothing, at another model, or at the run's own newest checkpoint.

Of another model everything is kept, and what the data have beside it is added. What may change of it is the recipe's
to say: `training.freeze` names parts that stay as they are to the bit, `training.lora` trains low-rank updates.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from plait.core.config import GenerationConfig
from plait.core.errors import PlaitError
from plait.core.files import link_files, publish_folder, read_json
from plait.data.dataset import Dataset
from plait.modalities.base import ENCODER_SOURCES, Vocabulary, same_network
from plait.modalities.registry import MODALITIES
from plait.modalities.text import Text
from plait.model import checkpoint as checkpoints
from plait.model import extend as growing
from plait.model import lora
from plait.model.adapted import FILE as ADAPTED_FILE
from plait.model.adapted import Base, weight_sums
from plait.model.chat_template import TEMPLATE
from plait.model.checkpoint import CHECKPOINT_SOURCES, Checkpoint, find_checkpoint
from plait.model.multimodal import Multimodal
from plait.training.build import model_config
from plait.training.run import Progress, Run
from plait.training.split import Split

BASE = "base"  # the folder, in a run's, of the run of ours that it stands on


def build_or_load_model(run: Run, brought: Mapping[str, BaseModel]) -> tuple[Multimodal, Text, Checkpoint | None]:
    """The model that a run starts with, its tokenizer, and the model that it was extended from, if any. What came from
    there is written down once: when the run goes on, it no longer needs that model. `brought` are the settings of
    modalities that the data bring along."""
    check(run)
    if brought and run.recipe.model.init_from is not None:
        raise PlaitError(
            f"{run.dataset.path} holds data of a kind of its own ({run.dataset.manifest.kind}), whose models begin "
            "anew: leave out --init-from and model.init_from."
        )
    source = _base(run) if run.settings.lora and run.recipe.model.init_from else _source(run)
    if source is not None and source.parts:
        raise PlaitError(
            f"{run.recipe.model.init_from} is a model of data of a kind of its own ({', '.join(source.parts)}), from "
            "which no other can go on yet."
        )
    with run.group.main_first():
        text = source.text if source else run.text()
    templated = text.chat_template is not None
    imported = source.model.config if source else None
    config = model_config(run.recipe, run.dataset, text.size, imported, templated, brought)
    if config.vocabulary.turns:
        text.settings["chat_template"] = TEMPLATE
    if source is not None and source.base is not None:
        model = growing.extend_frozen(source, config)
    else:
        model = growing.extend(source, config) if source else Multimodal(config)
    _fill_encoders(model, source.model if source else None)
    if source is not None and "source" not in run.metadata:
        old = source.model
        kept = [name for name in old.media if growing.kept_modality(model, old, name)]
        for name in old.media:
            if name not in kept:
                note = f"{name} has other settings than in {run.recipe.model.init_from}: its networks begin anew"
                run.report(Progress("note", 1, 1, note=note))
        codecs = [name for name in kept if name not in old.config.read_only]
        facts = {"vocabulary": old.vocabulary.model_dump(), "modalities": kept, "codecs": codecs}
        run.record(source={"name": run.recipe.model.init_from, **facts})
    return model, text, source


def check(run: Run) -> None:
    """Raise PlaitError where a recipe freezes or adapts what is not there."""
    settings, columns = run.settings, run.dataset.columns
    for name, weight in settings.weights.items():
        if name not in ("text", "contrastive", *MODALITIES) and not (name in columns and weight == 0):
            can = (
                "a column has no weight of its own but 0: never written"
                if name in columns
                else "there is no such thing"
            )
            raise PlaitError(
                f"training.weights.{name}: {weight:g} cannot be obeyed: {can}. Weights are of text, contrastive and "
                f"{', '.join(MODALITIES)}; columns are {', '.join(columns)}."
            )
    written = run.recipe.generation.max_new_tokens
    if unknown := [name for name in written if columns.get(name) != "text"]:
        texts = [name for name, kind in columns.items() if kind == "text"]
        raise PlaitError(
            f"generation.max_new_tokens: there is no column of texts '{unknown[0]}', only {', '.join(texts)}."
        )
    known = ["encoder", *(f"encoder.{name}" for name in MODALITIES), "backbone", "token_embedding"]
    for part in settings.freeze:
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"parts are {', '.join(known)}."
            raise PlaitError(f"There is no part '{part}' to freeze: {hint}")
    if (settings.freeze or settings.lora) and run.recipe.model.init_from is None:
        what = "training.freeze" if settings.freeze else "training.lora"
        raise PlaitError(f"{what} keeps what a model has learned. Name that model: --init-from RUN or model.init_from.")
    if settings.lora and settings.parallel == "fsdp" and run.group.size > 1:
        raise PlaitError("Low-rank updates are trained with whole models on each process. Use training.parallel: ddp.")


def _source(run: Run) -> Checkpoint | None:
    name = run.recipe.model.init_from
    if name is None:
        return None
    own = run.folder / "checkpoints"
    step = checkpoints.newest_whole(own)[0] if "source" in run.metadata else 0
    if step:
        return checkpoints.load(checkpoints.series(own)[step])
    return CHECKPOINT_SOURCES.one()(_begin(run, name) or name)


def _begin(run: Run, name: str) -> Path | None:
    """The folder of the model that a run starts from; None for a name of the hub, or a GGUF file. Raises PlaitError
    where it is the run's own."""
    folder = find_checkpoint(name)
    if folder is not None and folder.resolve().is_relative_to(run.folder.resolve()):
        raise PlaitError(f"A run cannot start from itself: {folder}. Choose another folder with -o.")
    return folder


def _base(run: Run) -> Checkpoint:
    """The model that a run with low-rank updates stands on, with how its checkpoints name it as `base`. A run of ours
    is linked, or copied, into the run's folder, so that it may go; an import is told by its name and content."""
    beside = run.folder / "checkpoints" / "last"
    if "base" in run.metadata:
        base = Base.model_validate(run.metadata["base"])
        source = base.load(beside, compact=True)
        source.base = base
        return source
    assert run.settings.lora is not None and run.recipe.model.init_from is not None
    name = run.recipe.model.init_from
    folder = _begin(run, name)
    where = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    if folder is not None and read_json(folder / "config.json").get("model_type") == "plait":
        folder, where = _keep_base(run, folder), f"../../{BASE}"
    source = CHECKPOINT_SOURCES.one()(folder or name, compact=True)
    assert source.origin is not None
    lora_settings = run.settings.lora
    source.base = Base(
        name=where, sha256=weight_sums(source.origin), rank=lora_settings.rank, alpha=lora_settings.alpha
    )
    run.record(base=source.base.model_dump())
    return source


def _keep_base(run: Run, folder: Path) -> Path:
    """A checkpoint of ours in the run's own folder, whole."""
    kept = run.folder / BASE
    with run.group.main_first():
        if run.group.is_main and not kept.is_dir():
            if (folder / ADAPTED_FILE).is_file():
                checkpoints.save(checkpoints.load(folder), kept)
            else:
                with publish_folder(kept) as temporary:
                    link_files(folder, temporary)
    return kept


def _fill_encoders(model: Multimodal, source: Multimodal | None) -> None:
    """Fill a new model's pretrained encoders from where their weights are, but for those that came with the `source`
    that it was extended from. Raises PlaitError where weights are missing or misshapen."""
    for name, modality in model.media.items():
        settings: Any = modality.settings
        if settings.hf_encoder is None:
            continue
        old = source.media.get(name) if source is not None else None
        if old is None or not same_network(old.settings, settings):
            ENCODER_SOURCES.one().fill(modality)


def apply_freezing(run: Run, model: Multimodal) -> None:
    """Take out of training what the recipe freezes, and give the backbone its low-rank updates. The numbers that they
    begin with are a function of the seed. Raises PlaitError where nothing is left to train."""
    source, settings = run.metadata.get("source"), run.settings
    if source is None:
        return
    parts = set(settings.freeze)
    if settings.lora:
        parts |= {"encoder", "backbone", "token_embedding"}
    was, kept = Vocabulary.model_validate(source["vocabulary"]), set(source["modalities"])
    masked = growing.freeze(model, parts, was, kept, set(run.dataset.columns.values()))
    if settings.lora:
        torch.manual_seed(settings.seed)
        lora.adapt(model.backbone, settings.lora.rank, settings.lora.alpha)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - masked
    if not trained:
        raise PlaitError(
            f"With {', '.join(sorted(parts))} frozen nothing is left to train. Freeze less, or use training.lora."
        )
    run.record(decided={**run.metadata["decided"], "trained": trained})
    run.report(Progress("note", 1, 1, note=f"{trained:,} parameters are trained, the others stay as they are"))


def labels_of(source: Checkpoint | None, dataset: Dataset, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The labels that were `found` in a dataset, and those of columns that only the source knows."""
    old = source.labels if source else {}
    return {**{column: values for column, values in old.items() if column not in dataset.columns}, **found}


def generation_of(source: Checkpoint | None, requested: GenerationConfig, split: Split) -> GenerationConfig:
    """A recipe's defaults of generation; where it has none of its own, those of the source. A text of a column has room
    for twice as many tokens as the longest of train (`split`) has, unless the recipe says how many."""
    rest = requested.model_copy(update={"max_new_tokens": {}})
    config = source.generation if source and rest == GenerationConfig() else requested
    # Texts alone are cut into windows, and blocks are not at hand: their lengths say nothing here.
    texts = split.texts if len(split.texts) + len(split.media) > 1 and split.blocks is None else {}
    longest = {column: int(tokens.lengths.max(initial=0)) for column, tokens in texts.items()}
    learnt = {column: 2 * tokens for column, tokens in longest.items() if tokens}
    return config.model_copy(update={"max_new_tokens": {**config.max_new_tokens, **learnt, **requested.max_new_tokens}})
