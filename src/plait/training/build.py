"""From the dial to a model: what a recipe and a dataset leave open is derived here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, ValidationError

from plait.core.config import SIZES, BackboneRecipe, Recipe, Size, describe_error, parse_recipe
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.record import are_labels
from plait.modalities.base import ENCODER_SOURCES, Vocabulary, code_levels
from plait.modalities.media import MEDIA
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.model.chat_template import TURNS
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig

MAX_LABELS = 1000  # distinct values up to which a text column counts as labels
LONGEST_LABEL = 200  # bytes
FITTED_BY = 100  # images or audio clips that a modality's settings are fitted to
EMBED_DIM = 128  # of a model of media, where a recipe says nothing


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
    backbone = _backbone(recipe, size, imported)
    columns = _columns(recipe, dataset, imported)
    kinds = list(brought) if brought else [name for name in MODALITIES if name in columns.values()]
    settings = dict(brought or {})
    for name in kinds:
        if name not in settings:
            settings[name] = _modality_settings(recipe, dataset, size, name, imported)
    vocabulary = Vocabulary(
        text=text_size,
        columns=columns,
        levels={token: levels for name in kinds for token, levels in code_levels(name, settings[name]).items()},
        closers=[name for name in kinds if MODALITIES[name].variable_length and is_writable(name)],
        end_id=imported.vocabulary.end_id if imported else None,  # a language model knows how its texts end
        more_ends=imported.vocabulary.more_ends if imported else None,
        turns=_turns(dataset, columns, imported, templated),
    )
    tied, embed_dim = recipe.model.tied, recipe.model.embed_dim
    if tied is None:
        tied = imported.tied if imported else bool(brought) or text_size > 8 * backbone.width
    if embed_dim is None:
        written = any(name in MEDIA or getattr(settings[name], "levels", None) for name in kinds)
        contrasted = recipe.training.weights.get("contrastive") != 0
        embed_dim = (imported.embed_dim if imported else 0) or (EMBED_DIM if written and contrasted else 0)
    embeds = imported if imported and imported.embed_dim else None
    return ModelConfig(
        backbone=backbone,
        vocabulary=vocabulary,
        embed_dim=embed_dim,
        contrastive=embeds.contrastive if embeds else recipe.model.contrastive,
        pools_inputs=embeds.pools_inputs if embeds else True,
        tied=tied,
        modalities={name: settings[name].model_dump() for name in kinds},
        read_only=_read_only(recipe, dataset, [*kinds, *columns], imported),
    )


def _backbone(recipe: Recipe, size: Size, imported: ModelConfig | None) -> TransformerConfig:
    if imported is None:
        return backbone_config(size, recipe.model.backbone)
    dropout = recipe.model.backbone.dropout
    return imported.backbone.model_copy(update={"dropout": dropout}) if dropout else imported.backbone


def _columns(recipe: Recipe, dataset: Dataset, imported: ModelConfig | None) -> dict[str, str]:
    """Column -> modality, an import's first. Raises PlaitError where the two do not agree."""
    columns = dict(imported.vocabulary.columns) if imported else {}
    for name, kind in dataset.columns.items():
        if columns.setdefault(name, kind) != kind:
            raise PlaitError(
                f"Column '{name}' of {dataset.path} holds {kind}, but in {recipe.model.init_from} it is "
                f"{columns[name]}. Give it another name: plait prepare --map {kind}={name}:NEWNAME."
            )
    return columns


def _turns(dataset: Dataset, columns: dict[str, str], imported: ModelConfig | None, templated: bool) -> list[str]:
    """Who may speak in conversations, a token each. Raises PlaitError where a column has such a name."""
    turns = list(imported.vocabulary.turns) if imported else []
    if dataset.manifest.chats and not turns and not templated:
        turns = list(TURNS)
    if clash := [name for name in turns if name in columns]:
        raise PlaitError(
            f"Column '{clash[0]}' of {dataset.path} has the name of a side of conversations. Give it another name: "
            f"plait prepare --map {columns[clash[0]]}={clash[0]}:NEWNAME."
        )
    return turns


def _modality_settings(
    recipe: Recipe, dataset: Dataset, size: Size, modality: str, imported: ModelConfig | None
) -> BaseModel:
    """An import's settings with the recipe's overrides laid over them where the data have the modality; without an
    import, settings that are fitted to the data."""
    overrides = getattr(recipe.model, modality)
    if imported is None or modality not in imported.modalities:
        settings: BaseModel = fit_settings(dataset, modality, size, overrides)
        return settings
    laid: BaseModel = _laid_over(
        imported.modalities[modality], overrides if modality in dataset.columns.values() else {}, modality
    )
    return laid


def is_writable(modality: str) -> bool:
    """Whether a modality can be made from codes; those without a codec are read alone."""
    return bool(getattr(MODALITIES[modality], "writable", True))


def _read_only(recipe: Recipe, dataset: Dataset, names: list[str], imported: ModelConfig | None) -> list[str]:
    """Modalities and columns that are never written: those without a codec, those of weight 0, and an import's that are
    not in the data."""
    here = {*dataset.columns, *dataset.columns.values()}
    unwritten = {name for name in names if recipe.training.weights.get(name) == 0}
    unwritten |= {name for name in names if name in MODALITIES and not is_writable(name)}
    if imported is not None:
        unwritten |= {name for name in imported.read_only if name not in here}
    return [name for name in dict.fromkeys(names) if name in unwritten]


def _laid_over(settings: dict[str, Any], overrides: dict[str, Any], modality: str) -> Any:
    try:
        return SETTINGS[modality].model_validate({**settings, **_with_hf_encoder(overrides, modality)})
    except ValidationError as error:
        lines = "; ".join(describe_error(e, SETTINGS[modality]) for e in error.errors())
        raise PlaitError(f"In the recipe's model.{modality}: {lines}") from None


def backbone_config(size: Size, recipe_values: BackboneRecipe) -> TransformerConfig:
    """The backbone of a row of the table of sizes, with a recipe's overrides."""
    width, heads = recipe_values.width or size.width, recipe_values.heads or size.heads
    if width % heads:
        raise PlaitError(f"model.backbone: width {width} must be a multiple of heads {heads}.")
    return TransformerConfig(
        width=width,
        layers=recipe_values.layers or size.layers,
        heads=heads,
        kv_heads=recipe_values.kv_heads or heads,
        head_width=width // heads,
        hidden=recipe_values.hidden or (round(width * 2.75 / 16) * 16 if recipe_values.width else size.hidden),
        max_length=recipe_values.context or size.context,
        dropout=recipe_values.dropout,
    )


def sized_config(recipe: Recipe) -> ModelConfig:
    """The network that a recipe calls for where the data are coloured images, audio and text of its size."""
    size = SIZES[recipe.model.size]
    encoder_overrides = {
        kind: _with_hf_encoder(getattr(recipe.model, kind), kind) for kind in MEDIA if is_writable(kind)
    }
    try:
        settings = {kind: SETTINGS[kind].of_size(size, overrides) for kind, overrides in encoder_overrides.items()}
    except ValidationError as error:
        raise PlaitError(f"In the recipe's model: {error.errors()[0]['msg']}") from None
    backbone = backbone_config(size, recipe.model.backbone)
    text = recipe.model.text.vocabulary or size.vocabulary
    vocabulary = Vocabulary(
        text=text,
        columns={kind: kind for kind in (*settings, "text")},
        levels={name: one.levels for name, one in settings.items()},
        closers=[kind for kind in settings if MODALITIES[kind].variable_length],
    )
    return ModelConfig(
        backbone=backbone,
        vocabulary=vocabulary,
        embed_dim=EMBED_DIM if recipe.model.embed_dim is None else recipe.model.embed_dim,
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
    """A modality's settings, fitted to some images or audio clips of train: as they lie spread over all records, since
    those of one label often lie side by side."""
    examples: list[bytes] = []
    columns = [c for c, kind in dataset.columns.items() if kind == modality]
    train = dataset.indices("train")
    first = train[:: max(len(train) // FITTED_BY, 1)]
    for indices in (first, train):  # all, one after the other, where none of the first has the modality
        for record in dataset.iterate(indices, columns):
            examples += [part for part in record.parts.values() if isinstance(part, bytes)]
            if len(examples) >= FITTED_BY:
                break
        if examples:
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
    labels = {}
    train = dataset.indices("train")
    others = {*dataset.manifest.chats, *dataset.manifest.multi_label, *dataset.manifest.numbers}
    for column, kind in dataset.columns.items():
        if kind != "text" or column in others:
            continue
        known = dataset.manifest.statistics.get(column)
        if known is not None and known.max > longest:
            continue  # one is longer: no labels, and nothing to read
        values = _few_values(dataset.cells(column, train))
        if values is None or any(len(value.encode()) > longest for value in values.distinct):
            continue
        if are_labels(column, len(values.distinct), values.count, per_label=2):
            labels[column] = values.distinct
    return labels


@dataclass
class _Values:
    """The different values of a column, in the order of their first appearance, and how many there are in all."""

    distinct: list[str]
    count: int


def _few_values(cells: Iterable[pa.Array]) -> _Values | None:
    """Those of a column's cells; None where more than MAX_LABELS differ."""
    distinct: dict[str, None] = {}
    count = 0
    for array in cells:
        count += len(array) - array.null_count
        distinct |= dict.fromkeys(value for value in pc.unique(array).to_pylist() if value is not None)
        if len(distinct) > MAX_LABELS:
            return None
    return _Values(list(distinct), count)
