"""Recipes: one YAML file names data, model and training. One dial, `size`, derives whatever a recipe leaves out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from plait.core.errors import PlaitError
from plait.core.features import features
from plait.core.recipes import find_recipe
from plait.core.settings import Settings, with_sections


@with_sections("data")
class DataRecipe(Settings):
    """How `plait prepare` reads a source; see `plait prepare --help`."""

    map: dict[str, str] = Field(
        {},
        description="Column -> image, audio, text, labels, number, chat, id, split, each, ignore: docs/how-to/data.md.",
    )
    labels: dict[str, list[str]] = Field({}, description="Names of a column's integer classes, in their order.")
    pattern: str | None = Field(
        None, description="Regular expression on file names; its named groups become text columns."
    )
    group_by: str | None = Field(
        None, description="Column, folder or name:N (part of a file's name) whose records share a split."
    )


class BackboneRecipe(Settings):
    """Overrides of what `size` derives for the backbone."""

    width: int | None = Field(None, ge=8, description="Dimension of the hidden states; a multiple of heads.")
    layers: int | None = Field(None, ge=1, description="Number of transformer blocks.")
    heads: int | None = Field(None, ge=1, description="Attention heads of the queries.")
    kv_heads: int | None = Field(
        None, ge=1, description="Attention heads of keys and values; as many as heads where None."
    )
    hidden: int | None = Field(None, ge=8, description="Width of the feed-forward layers.")
    context: int | None = Field(None, ge=16, description="Longest sequence, in tokens.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of activations that a training step drops.")


class TextRecipe(Settings):
    """Overrides of what `size` and the data derive for text."""

    vocabulary: int | None = Field(
        None, ge=256, description="Ids of the byte-level BPE tokenizer that is trained on the data."
    )


@with_sections("model")
class ModelRecipe(Settings):
    """What is trained: a size, what it starts from, and overrides of its parts."""

    size: Literal["tiny", "small", "base", "large"] = Field(
        "tiny", description="A row of the table of sizes, from which all that is left out follows."
    )
    init_from: str | None = Field(
        None,
        description="A run, a checkpoint, or a Hugging Face name or folder to start from; of images with captions also "
        "two encoders, as VISION,TEXT.",
    )
    backbone: BackboneRecipe = Field(BackboneRecipe(), description="Overrides of the backbone; see model.backbone.")
    text: TextRecipe = Field(TextRecipe(), description="Overrides for text; see model.text.")
    image: dict[str, Any] = Field({}, description="Overrides for images; see model.image.")
    audio: dict[str, Any] = Field({}, description="Overrides for audio; see model.audio.")
    video: dict[str, Any] = Field({}, description="Overrides for video; see model.video.")
    embed_dim: int | None = Field(
        None,
        ge=0,
        description="Dimension of the embedding space; 0 for none, 128 where None and there are media.",
    )
    contrastive: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="The loss that makes the embedding space: softmax over the batch, as in CLIP, or sigmoid, as in "
        "SigLIP, which is for large batches: in short runs of small ones it learns more slowly.",
    )
    tied: bool | None = Field(
        None,
        description="Whether the output layer shares the token embedding's weights; if None, in large vocabularies.",
    )


class LoraRecipe(Settings):
    """Low-rank updates of the backbone's matrices; all else that came with init_from is frozen."""

    rank: int = Field(8, ge=1, description="Rank of the updates.")
    alpha: float = Field(16.0, gt=0, description="Scale of the updates: they count alpha / rank times.")
    keep: float = Field(
        0.5,
        ge=0,
        description="Weight of the divergence from what the base replies to general questions, beside conversations of "
        "an imported chat model; 0 for none.",
    )


TASKS = ("auto", "recognise", "describe", "draw", "language", "chat", "reply")


def known_tasks() -> tuple[str, ...]:
    """What data may be wanted for: `TASKS`, and the names of features with data of their own."""
    return (*TASKS, *(feature.name for feature in features() if "task" in feature.adds))


class TrainingRecipe(Settings):
    """How a model is trained."""

    task: str = Field("auto", description="What the model is wanted for; auto sees it in the data.")
    minutes: float | None = Field(None, gt=0, description="Time budget for codecs and model together.")
    steps: int | None = Field(None, ge=1, description="Steps of the model, instead of minutes.")
    max_minutes: float | None = Field(
        None, gt=0, description="Most time for codecs and model together; steps that it does not hold are left out."
    )
    codec_steps: int | None = Field(None, ge=1, description="Steps of each codec, instead of its share of the minutes.")
    codec_share: float = Field(0.1, ge=0, lt=0.5, description="Share of the minutes for each codec.")
    recogniser_steps: int | None = Field(
        None, ge=1, description="Steps of each encoder that is trained on labels, instead of its share of the minutes."
    )
    recogniser_share: float = Field(
        0.8, ge=0, lt=1, description="Share of the minutes for encoders that are trained on labels, together."
    )
    batch_size: int | None = Field(None, ge=2, description="Records, or windows of text, a step.")
    block_megabytes: int = Field(
        32,
        ge=1,
        description="Text that is tokenised before training begins, and shuffled together in the first epoch; the rest "
        "is tokenised meanwhile, in blocks of this size.",
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak of the learning rate's schedule.")
    codec_learning_rate: float = Field(3e-3, gt=0, description="Learning rate of the codecs.")
    encoder_lr_scale: float = Field(
        0.05, gt=0, description="Learning rate of a pretrained encoder, as a share of the model's."
    )
    warmup: float = Field(0.04, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.05, ge=0, description="Weight decay of AdamW, on matrices.")
    grad_clip: float = Field(1.0, gt=0, description="Norm at which gradients are clipped.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of each target that is spread over what is possible there."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an average of the weights, which is then what is used; None for no average.",
    )
    betas: tuple[float, float] = Field((0.9, 0.98), description="Decays of AdamW's first and second moments.")
    weights: dict[str, float] = Field(
        {},
        description="Of text, image, audio (1) and contrastive (.5). A modality or column of weight 0 is only read.",
    )
    cond_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of samples that are written without their condition, for classifier-free guidance.",
    )
    full_softmax_prob: float = Field(
        0.05, ge=0, le=1, description="Share of steps whose softmax runs over the whole vocabulary."
    )
    freeze: list[str] = Field(
        [],
        description="Parts left as they are: encoder, encoder.image, encoder.audio, backbone, token_embedding.",
    )
    lora: LoraRecipe | None = Field(
        None, description="Train low-rank updates of the backbone; see training.lora. None to train it whole."
    )
    replay: dict[str, float] = Field(
        {}, description="Further prepared datasets -> the share of every batch that comes from each."
    )
    augment: bool = Field(True, description="Whether what is read is augmented.")
    augment_targets: bool | None = Field(
        None, description="Whether what is written is augmented too; by itself where a modality has few samples."
    )
    validations: int = Field(20, ge=1, description="Validations in a run.")
    patience: int = Field(6, ge=1, description="Validations without improvement before training stops.")
    grad_accum_steps: int = Field(
        1, ge=1, description="Parts of a batch that are computed one after the other, to save memory."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Several processes hold a whole model each (ddp), or share the backbone's blocks (fsdp).",
    )
    activation_checkpointing: bool = Field(
        False, description="Compute the backbone's activations again in the backward pass, to save memory."
    )
    save_every: int | None = Field(None, ge=1, description="Steps between checkpoints; at every validation where None.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept, beside the best.")
    keep_every: int | None = Field(None, ge=1, description="Steps whose multiples are kept too, where they were saved.")
    canaries: int = Field(
        0,
        ge=0,
        le=1000,
        description="Random texts planted 1, 10 and 100 times in turn, to see which are learnt by heart.",
    )
    log_records: bool = Field(False, description="Write records.jsonl: the loss and the record ids of every step.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Of the arithmetic; auto takes bf16 where the processor or GPU is fast in it."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="Compile the blocks; auto: text alone, 10 minutes or more, and no faster kernel."
    )
    seed: int = Field(0, description="Of weights, order and augmentation.")

    @field_validator("task")
    @classmethod
    def _task(cls, value: str) -> str:
        if value not in known_tasks():
            raise ValueError(f"'{value}' is no task; known are {', '.join(known_tasks())}")
        return value

    @model_validator(mode="after")
    def _capped(self) -> TrainingRecipe:
        if self.max_minutes is not None and self.steps is None:
            raise ValueError("max_minutes caps a number of steps: give steps beside it, or minutes alone")
        return self

    @field_validator("replay")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < share < 1 for share in value.values()) or sum(value.values()) >= 1:
            raise ValueError("shares must lie between 0 and 1, and leave some to the new data")
        return value


class GenerationConfig(Settings):
    """Defaults of generation, kept with the weights; every call may override them."""

    temperature: float = Field(
        1.0, ge=0, description="Of text: above 1 flattens probabilities, below sharpens them, 0 takes the likeliest."
    )
    media_temperature: dict[str, float] = Field(
        {"image": 0.8, "audio": 0.5}, description="The same of codes, by modality."
    )
    top_k: int = Field(0, ge=0, description="Sample among so many likeliest tokens; 0 for all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample among the likeliest tokens that together have this probability."
    )
    guidance: dict[str, float] = Field(
        {"image": 2.0, "audio": 2.0}, description="Classifier-free guidance by modality; 1 is none."
    )
    max_new_tokens: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="The most tokens of a text, by the column that it is written in; training fills in twice the "
        "longest text of train. Without one only the context ends it.",
    )


class Recipe(Settings):
    """A whole recipe, validated."""

    data: DataRecipe = Field(DataRecipe(), description="How the source is read.")
    model: ModelRecipe = Field(ModelRecipe(), description="What is trained.")
    training: TrainingRecipe = Field(TrainingRecipe(), description="How it is trained.")
    generation: GenerationConfig = Field(
        GenerationConfig(), description="Defaults of generation, kept with the weights."
    )


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
