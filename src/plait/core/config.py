"""Recipes: one YAML file names data, model and training. One dial, `size`, derives whatever a recipe leaves out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from plait.core.errors import PlaitError
from plait.core.recipes import find_recipe


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


ITEM_COLUMNS = ("user", "item", "time", "weight", "id", "title", "text", "categories", "image", "audio")


class ItemsRecipe(_Settings):
    """How histories of items are read and what of them is held out; see docs/recommending.md."""

    interactions: str | None = None  # file of the source; found by itself where there is one
    items: str | None = None  # likewise, the table of the items
    columns: dict[str, str] = {}  # user, item, time, weight; id, title, text, categories, image, audio -> column
    split: Literal["leave-one-out", "time"] = "leave-one-out"
    least_weight: float | None = None  # interactions of less are left out
    untested: str | None = None  # FILE:COLUMN of a table of users; those marked 1 or true are learnt from alone
    cold: float = Field(0.0, ge=0, lt=1)  # share of the items that training never sees

    @field_validator("columns")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in value if name not in ITEM_COLUMNS]:
            raise ValueError(f"'{unknown[0]}' is nothing that a column holds; known are {', '.join(ITEM_COLUMNS)}")
        return value


class DataRecipe(_Settings):
    """How `plait prepare` reads a source; see `plait prepare --help`."""

    map: dict[str, str] = {}  # column -> image, audio, text or ignore
    labels: dict[str, list[str]] = {}  # names of a column's integer classes
    pattern: str | None = None  # regular expression on file names whose named groups become text columns
    items: ItemsRecipe | None = None  # the source holds histories


class BackboneRecipe(_Settings):
    """Overrides of what `size` derives for the backbone."""

    width: int | None = Field(None, ge=8)
    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=8)
    context: int | None = Field(None, ge=16)
    dropout: float = Field(0.0, ge=0, lt=1)


class TextRecipe(_Settings):
    vocabulary: int | None = Field(None, ge=256)  # ids of the byte-level BPE


class ItemModelRecipe(_Settings):
    codes: Literal["auto", "one", "semantic"] = "auto"  # of an item: one up to 200,000 items, else semantic
    encoder: str | None = None  # a run or an import whose embeddings are part of what is known of items
    words: int = Field(1024, ge=0)  # of titles, categories and texts, the most that the content tells apart
    drop: float = Field(0.1, ge=0, lt=1)  # share of learnt rows that a step hides
    sampled: int | None = Field(None, ge=0)  # items drawn for the softmax, 0 for all; by itself above 30,000 items


class ModelRecipe(_Settings):
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    init_from: str | None = None  # a run, a checkpoint, or a Hugging Face name or folder to start from
    backbone: BackboneRecipe = BackboneRecipe()
    text: TextRecipe = TextRecipe()
    image: dict[str, Any] = {}  # overrides of modalities.image.ImageSettings
    audio: dict[str, Any] = {}  # overrides of modalities.audio.AudioSettings
    item: ItemModelRecipe = ItemModelRecipe()
    embed_dim: int | None = Field(None, ge=0)
    tied: bool | None = None


class LoraRecipe(_Settings):
    """Low-rank updates of the backbone's matrices; all else that came with init_from is frozen."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)  # the updates count alpha / rank times


Task = Literal["auto", "recognise", "describe", "draw", "language", "chat", "reply", "recommend"]


class TrainingRecipe(_Settings):
    task: Task = "auto"  # what the model is wanted for; auto sees it in the data
    minutes: float | None = Field(None, gt=0)  # for codecs and model together
    steps: int | None = Field(None, ge=1)  # of the model; instead of minutes
    codec_steps: int | None = Field(None, ge=1)
    codec_share: float = Field(0.1, ge=0, lt=0.5)  # of the minutes, for each codec
    recogniser_steps: int | None = Field(None, ge=1)  # of each encoder that is trained on labels
    recogniser_share: float = Field(0.7, ge=0, lt=1)  # of the minutes, for these encoders together
    batch_size: int | None = Field(None, ge=2)  # records, or windows of text
    learning_rate: float | None = Field(None, gt=0)
    codec_learning_rate: float = Field(3e-3, gt=0)
    encoder_lr_scale: float = Field(0.05, gt=0)  # learning rate of a pretrained encoder, as a share of the model's
    warmup: float = Field(0.04, ge=0, lt=1)  # share of the steps
    weight_decay: float = Field(0.05, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of each target spread over what is possible there
    ema: float | None = Field(None, gt=0, lt=1)  # decay of an average of the weights, which is then what is used
    betas: tuple[float, float] = (0.9, 0.98)
    weights: dict[str, float] = {}  # of objectives: text, image, audio (1), contrastive (.5); 0, also of a column: read
    cond_dropout: float = Field(0.1, ge=0, lt=1)  # share of samples written without their condition
    full_softmax_prob: float = Field(0.05, ge=0, le=1)  # share of steps whose softmax runs over the whole vocabulary
    freeze: list[str] = []  # parts of init_from: encoder, encoder.image, encoder.audio, backbone, token_embedding
    lora: LoraRecipe | None = None
    replay: dict[str, float] = {}  # further prepared datasets -> the share of every batch that comes from each
    augment: bool = True
    augment_targets: bool | None = None  # also what is written; by itself where a modality has few samples
    validations: int = Field(20, ge=1)  # in a run
    patience: int = Field(6, ge=1)  # validations without improvement before stopping
    grad_accum_steps: int = Field(1, ge=1)  # parts of a batch that are computed one after the other, to save memory
    parallel: Literal["ddp", "fsdp"] = "ddp"  # many processes: a whole model each, or the backbone's blocks sharded
    activation_checkpointing: bool = False  # the backbone's activations in the backward pass, to save memory
    save_every: int | None = Field(None, ge=1)  # steps; by itself at every validation
    keep: int = Field(2, ge=1)  # newest checkpoints, beside the best of each
    keep_every: int | None = Field(None, ge=1)  # steps whose multiples are kept too, where they were saved
    canaries: int = Field(0, ge=0, le=1000)  # random texts planted 1, 10 and 100 times in turn, to be found again
    log_records: bool = False  # records.jsonl: the loss and the record ids of every step
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # blocks; auto: text alone, 10 minutes or more, no native step
    seed: int = 0

    @field_validator("replay")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < share < 1 for share in value.values()) or sum(value.values()) >= 1:
            raise ValueError("shares must lie between 0 and 1, and leave some to the new data")
        return value


class GenerationConfig(_Settings):
    """Defaults of generation, kept with the weights; every call may override them."""

    temperature: float = Field(1.0, ge=0)  # of text
    media_temperature: dict[str, float] = {"image": 0.8, "audio": 0.5}
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    guidance: dict[str, float] = {"image": 2.0, "audio": 2.0}


class Recipe(_Settings):
    """A whole recipe, validated."""

    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    training: TrainingRecipe = TrainingRecipe()
    generation: GenerationConfig = GenerationConfig()


class Size(BaseModel):
    """One row of the table of sizes."""

    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    image: int  # side in pixels; smaller images keep their own
    rate: int  # of audio, Hz
    seconds: float  # longest clip
    vocabulary: int
    batch_size: int
    learning_rate: float
    minutes: float


SIZES = {
    "tiny": Size(
        width=128, layers=4, heads=4, hidden=352, context=512, image=32, rate=8000, seconds=1.6,
        vocabulary=512, batch_size=32, learning_rate=2e-3, minutes=3,
    ),
    "small": Size(
        width=256, layers=6, heads=4, hidden=704, context=1024, image=64, rate=16000, seconds=5,
        vocabulary=4096, batch_size=32, learning_rate=1e-3, minutes=30,
    ),
    "base": Size(
        width=512, layers=8, heads=8, hidden=1408, context=2048, image=128, rate=16000, seconds=10,
        vocabulary=16384, batch_size=64, learning_rate=6e-4, minutes=600,
    ),
    "large": Size(
        width=1024, layers=16, heads=16, hidden=2816, context=4096, image=256, rate=24000, seconds=20,
        vocabulary=32768, batch_size=128, learning_rate=3e-4, minutes=6000,
    ),
}  # fmt: skip


def load_recipe(path: str | Path | None, overrides: dict[str, dict[str, Any]] | None = None) -> Recipe:
    """The recipe in a YAML file or of a packaged name, or the default one, with overrides by section laid over it.

    Raises PlaitError naming the file, the key and the nearest known key.
    """
    raw: Any = {}
    if path is not None:
        path = find_recipe(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise PlaitError(f"Recipe {path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PlaitError(f"Recipe {path} is not YAML: {error}") from error
        if not isinstance(raw, dict):
            raise PlaitError(f"Recipe {path} must hold the sections data, model and training.")
    for section, values in (overrides or {}).items():
        known = {key: value for key, value in values.items() if value is not None}
        if known:
            raw[section] = {**(raw.get(section) or {}), **known}
    return parse_recipe(raw, str(path or "the options"))


def as_recipe(recipe: Recipe | str | Path | Mapping[str, Any] | None, overrides: dict[str, dict[str, Any]]) -> Recipe:
    """A recipe from what people give: none, the path of a YAML file, a dictionary, or a Recipe; with overrides by
    section laid over it, of which None says nothing.

    Raises PlaitError naming the key that is unknown or wrong.
    """
    if recipe is None or isinstance(recipe, (str, Path)):
        return load_recipe(recipe, overrides)
    raw = recipe.model_dump(mode="json", exclude_unset=True) if isinstance(recipe, Recipe) else dict(recipe)
    for section, values in overrides.items():
        if known := {key: value for key, value in values.items() if value is not None}:
            raw[section] = {**(raw.get(section) or {}), **known}
    return parse_recipe(raw, "the recipe")


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe that came as a dictionary; `where` names its origin in messages."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise PlaitError(f"In {where}: " + "; ".join(describe_error(e, Recipe) for e in error.errors())) from None


def describe_error(error: Any, model: type[BaseModel]) -> str:
    """One line for a pydantic error, with the nearest known key where a key is unknown."""
    path = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(path)}: {error['msg']}, not {error['input']!r}"
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    near = difflib.get_close_matches(path[-1], model.model_fields, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(model.model_fields)}"
    return f"unknown key {'.'.join(path)}: {hint}"
