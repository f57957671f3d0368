"""From the dial to a model: what a recipe and a dataset leave open is derived here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from plait.core.config import SIZES, BackboneRecipe, Recipe, Size, describe_error, parse_recipe
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.modalities.base import ENCODER_SOURCES, Vocabulary, code_levels
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.model.chat_template import TURNS
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig

MAX_LABELS = 1000  # distinct values up to which a text column counts as labels
LONGEST_LABEL = 200  # bytes


def model_config(
    recipe: Recipe,
    dataset: Dataset,
    text_size: int,
    imported: ModelConfig | None,
    templated: bool = False,
    brought: Mapping[str, BaseModel] | None = None,
) -> ModelConfig:
    """The network that a recipe and a dataset call for. Of an `imported` one all is kept, and what the dataset has
    beside it is added; the settings of its modalities hold, with the recipe's overrides laid over them. Conversations
    need tokens for their turns, unless they are `templated`. `brought` are the settings of modalities that data of
    a kind of its own bring along, which are then all that the model has.

    Raises PlaitError where a column of the dataset is of another modality than the import's.
    """
    size = SIZES[recipe.model.size]
    if imported is not None:
        backbone = imported.backbone
        dropout = recipe.model.backbone.dropout
        backbone = backbone.model_copy(update={"dropout": dropout}) if dropout else backbone
    else:
        backbone = backbone_config(size, recipe.model.backbone)
    columns = dict(imported.vocabulary.columns) if imported else {}
    for name, kind in dataset.columns.items():
        if columns.setdefault(name, kind) != kind:
            raise PlaitError(
                f"Column '{name}' of {dataset.path} holds {kind}, but in {recipe.model.init_from} it is "
                f"{columns[name]}. Give it another name: plait prepare --map {kind}={name}:NEWNAME."
            )
    turns = list(imported.vocabulary.turns) if imported else []
    if dataset.manifest.chats and not turns and not templated:
        turns = list(TURNS)
    if clash := [name for name in turns if name in columns]:
        raise PlaitError(
            f"Column '{clash[0]}' of {dataset.path} has the name of a side of conversations. Give it another name: "
            f"plait prepare --map {columns[clash[0]]}={clash[0]}:NEWNAME."
        )
    kinds = [m for m in MODALITIES if m in columns.values()]
    settings: dict[str, Any] = {}
    if brought:
        kinds, settings = list(brought), dict(brought)
    for m in kinds:
        if m in settings:
            continue
        overrides = getattr(recipe.model, m)
        if imported and m in imported.modalities:
            overrides = overrides if m in dataset.columns.values() else {}
            settings[m] = _laid_over(imported.modalities[m], overrides, m)
        else:
            settings[m] = fit_settings(dataset, m, size, overrides)
    coded = [m for m in kinds if settings[m].levels]
    vocabulary = Vocabulary(
        text=text_size,
        columns=columns,
        levels={name: levels for m in kinds for name, levels in code_levels(m, settings[m]).items()},
        closers=[m for m in kinds if MODALITIES[m].variable_length],
        turns=turns,
    )
    tied = recipe.model.tied
    if tied is None:
        tied = imported.tied if imported else bool(brought) or text_size > 8 * backbone.width
    embed_dim = recipe.model.embed_dim
    if embed_dim is None:
        embed_dim = (imported.embed_dim if imported else 0) or (128 if coded else 0)
    unwritten = {name for name in (*kinds, *columns) if recipe.training.weights.get(name) == 0}
    if imported is not None:
        unwritten |= {name for name in imported.read_only if name not in {*dataset.columns, *dataset.columns.values()}}
    return ModelConfig(
        backbone=backbone,
        vocabulary=vocabulary,
        embed_dim=embed_dim,
        contrastive=imported.contrastive if imported and imported.embed_dim else recipe.model.contrastive,
        pools_inputs=imported.pools_inputs if imported and imported.embed_dim else True,
        tied=tied,
        modalities={m: settings[m].model_dump() for m in kinds},
        read_only=[name for name in dict.fromkeys([*kinds, *columns]) if name in unwritten],
    )


def _laid_over(settings: dict[str, Any], overrides: dict[str, Any], modality: str) -> Any:
    try:
        return SETTINGS[modality].model_validate({**settings, **_with_hf_encoder(overrides, modality)})
    except ValidationError as error:
        lines = "; ".join(describe_error(e, SETTINGS[modality]) for e in error.errors())
        raise PlaitError(f"In the recipe's model.{modality}: {lines}") from None


def backbone_config(size: Size, mine: BackboneRecipe) -> TransformerConfig:
    """The backbone of a row of the table of sizes, with a recipe's overrides."""
    width, heads = mine.width or size.width, mine.heads or size.heads
    if width % heads:
        raise PlaitError(f"model.backbone: width {width} must be a multiple of heads {heads}.")
    return TransformerConfig(
        width=width,
        layers=mine.layers or size.layers,
        heads=heads,
        kv_heads=mine.kv_heads or heads,
        head_width=width // heads,
        hidden=mine.hidden or (round(width * 2.75 / 16) * 16 if mine.width else size.hidden),
        max_length=mine.context or size.context,
        dropout=mine.dropout,
    )


def sized_config(recipe: Recipe) -> ModelConfig:
    """The network that a recipe calls for where the data are coloured images, audio and text of its size."""
    size = SIZES[recipe.model.size]
    image, audio = (_with_hf_encoder(getattr(recipe.model, m), m) for m in ("image", "audio"))
    side = image["hf_encoder"]["size"] if "hf_encoder" in image else size.image
    try:
        settings = {
            "image": SETTINGS["image"].sized(side, {"channels": 3, **image}),
            "audio": SETTINGS["audio"].sized(size.rate, {"seconds": size.seconds, **audio}),
        }
    except ValidationError as error:
        raise PlaitError(f"In the recipe's model: {error.errors()[0]['msg']}") from None
    backbone = backbone_config(size, recipe.model.backbone)
    text = recipe.model.text.vocabulary or size.vocabulary
    vocabulary = Vocabulary(
        text=text,
        columns={"image": "image", "audio": "audio", "text": "text"},
        levels={name: one.levels for name, one in settings.items()},
        closers=["audio"],
    )
    return ModelConfig(
        backbone=backbone,
        vocabulary=vocabulary,
        embed_dim=128 if recipe.model.embed_dim is None else recipe.model.embed_dim,
        contrastive=recipe.model.contrastive,
        pools_inputs=True,
        tied=text > 8 * backbone.width if recipe.model.tied is None else recipe.model.tied,
        modalities={name: one.model_dump() for name, one in settings.items()},
        read_only=[name for name in settings if recipe.training.weights.get(name) == 0],
    )


def _with_hf_encoder(overrides: dict[str, Any], modality: str) -> dict[str, Any]:
    """A recipe's overrides of a modality's settings, with what the pretrained encoder that they name is."""
    if "hf_encoder" in overrides:
        raise PlaitError(
            f"In the recipe's model.{modality}: encoder is filled in by itself; name the encoder as encoder."
        )
    if overrides.get("encoder") is None:
        return overrides
    return {**overrides, "hf_encoder": ENCODER_SOURCES.one().describe(overrides["encoder"], modality).model_dump()}


def size_table() -> dict[str, dict[str, str]]:
    """Size -> what it stands for, and the parameters of a model of coloured images, audio and text."""
    rows = {}
    for name, size in SIZES.items():
        config = sized_config(parse_recipe({"model": {"size": name}}, "sizes"))
        with torch.device("meta"):
            parameters = sum(Multimodal(config).parameter_count().values())
        rows[name] = {"parameters": f"{parameters / 1e6:.1f}M", **{k: f"{v:g}" for k, v in size.model_dump().items()}}
    return rows


def fit_settings(dataset: Dataset, modality: str, size: Size, overrides: dict[str, Any]) -> Any:
    """A modality's settings, fitted to the first images or audio clips of train."""
    examples: list[bytes] = []
    columns = [c for c, kind in dataset.columns.items() if kind == modality]
    for record in dataset.iterate(dataset.indices("train"), columns):
        examples += [part for part in record.parts.values() if isinstance(part, bytes)]
        if len(examples) >= 100:
            break
    if not examples:
        raise PlaitError(f"No record of train in {dataset.path} has {modality}; map its columns to ignore.")
    overrides = _with_hf_encoder(overrides, modality)
    try:
        return SETTINGS[modality].fitted(size, examples, overrides)
    except ValidationError as error:
        lines = "; ".join(describe_error(e, SETTINGS[modality]) for e in error.errors())
        raise PlaitError(f"In the recipe's model.{modality}: {lines}") from None


def label_columns(dataset: Dataset, context: int) -> dict[str, list[str]]:
    """Text columns with few distinct values, each with those in the order of their first appearance. A label must be
    short, and fit a context of so many tokens beside what it is the label of."""
    longest = min(LONGEST_LABEL, context // 2)
    found = {}
    train = dataset.indices("train")
    for column, kind in dataset.columns.items():
        if kind != "text" or column in dataset.manifest.chats:
            continue
        texts = dataset.texts(column)
        values = [texts[i] for i in train if texts[i] is not None]
        distinct = list(dict.fromkeys(values))
        short = all(len(value.encode()) <= longest for value in distinct)
        if short and 1 < len(distinct) <= min(MAX_LABELS, len(values) // 2):
            found[column] = distinct
    return found
