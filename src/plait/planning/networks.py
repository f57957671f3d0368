"""Networks by name or recipe, built on the meta device: their parameters, FLOPs, and the best size for a budget."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from plait.core.config import SIZES, Recipe, load_recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.recipes import packaged_recipes
from plait.hf.architectures import imported
from plait.hf.gguf_files import GGUF
from plait.modalities.base import Vocabulary
from plait.model import lora
from plait.model.checkpoint import find_checkpoint
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig
from plait.training.build import sized_config


@dataclass(frozen=True)
class Network:
    """A network to plan, which nothing is allocated for."""

    name: str
    config: ModelConfig
    tokens: float | None = None  # that it was trained on, or is to be
    batch_tokens: float | None = None  # a step, of all devices
    warnings: tuple[str, ...] = ()
    recipe: Recipe | None = field(default=None, compare=False)
    lora: int | None = None  # rank of the low-rank updates that are trained alone
    pretrained: bool = False  # weights lie beside the configuration, ready for use

    @cached_property
    def model(self) -> Multimodal:
        """The network with one block, which all others are like, on the meta device: shapes without memory."""
        backbone = self.config.backbone.model_copy(update={"layers": 1})
        with torch.device("meta"):
            return Multimodal(self.config.model_copy(update={"backbone": backbone}))

    @cached_property
    def parts(self) -> dict[str, int]:
        """Part -> its parameters; together all of them."""
        by_part: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            part, times = _part(name), self.config.backbone.layers if name.startswith("backbone.blocks.") else 1
            by_part[part] = by_part.get(part, 0) + parameter.numel() * times
        return by_part

    @property
    def parameters(self) -> int:
        """How many there are in all."""
        return sum(self.parts.values())

    @cached_property
    def updates(self) -> int:
        """Parameters of the low-rank updates; 0 where all of the network is trained."""
        if self.lora is None:
            return 0
        block = self.model.backbone.blocks[0]
        count = 0
        for name in lora.ADAPTED:
            outputs, inputs = getattr(block, name).weight.shape
            parts = lora.parts_of(self.config.backbone, name, outputs, self.lora, 1.0)
            count += self.lora * (len(parts) * inputs + outputs)
        return count * self.config.backbone.layers

    @cached_property
    def block(self) -> int:
        """Parameters of one block of the backbone."""
        return _count(self.model.backbone.blocks[0])

    def flops_a_token(self, length: int, attention: bool = True) -> float:
        """Of a training step, forward and backward: 6 N, every parameter counted (Kaplan et al., 2020). With
        `attention`, 6 times what takes part in products (no rows that are only looked up, no positions) and
        6 L h (d_qk + d_v) s, the causal half counted whole as is usual. Frozen parameters have no gradients of their
        own: 4 N, and 6 of the updates."""
        each, updates = (6.0, 0.0) if self.lora is None else (4.0, 6.0 * self.updates)
        if not attention:
            return each * self.parameters + updates
        c = self.config.backbone
        looked_up = self.parts.get("positions", 0) + (0 if self.config.tied else self.parts["token embedding"])
        return each * (self.parameters - looked_up) + updates + 6.0 * c.layers * c.heads * 2 * c.head_width * length

    def cache_a_token(self, size: int = 2) -> int:
        """Bytes of keys and values that one position leaves behind, at `size` bytes a number."""
        c = self.config.backbone
        return 2 * c.layers * c.kv_heads * c.head_width * size


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _part(name: str) -> str:
    """The part that a parameter belongs to, for people."""
    head, _, rest = name.partition(".")
    if head == "modalities":
        modality, door = rest.split(".")[:2]
        return f"{modality} {door}"
    if head == "backbone":
        if rest == "positions":
            return "positions"
        if "norm" in rest:
            return "norms"
        return "attention" if ".qkv" in rest or ".attention" in rest else "feed-forward"
    return {"token_embedding": "token embedding", "lm_head": "lm head"}.get(head, "embedding space")


# --- by name ----------------------------------------------------------------------------------------------------

# Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1, as printed: layers, width, heads, head width,
# tokens a step. Two rows contradict themselves (heads x head width is not the width), and are mended by `_fitting`.
GPT3 = {
    "small": (12, 768, 12, 64, 0.5e6),
    "medium": (24, 1024, 16, 64, 0.5e6),
    "large": (24, 1536, 16, 96, 0.5e6),
    "xl": (24, 2048, 24, 128, 1e6),
    "2.7b": (32, 2560, 32, 80, 1e6),
    "6.7b": (32, 4096, 32, 128, 2e6),
    "13b": (40, 5140, 40, 128, 2e6),
    "175b": (96, 12288, 96, 128, 3.2e6),
}
# Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 3: layers, width, heads, hidden, tokens trained on.
LLAMA3 = {
    "8b": (32, 4096, 32, 14336, 15e12),
    "70b": (80, 8192, 64, 28672, 15e12),
    "405b": (126, 16384, 128, 53248, 15.6e12),
}
PRESETS = [*SIZES, *(f"gpt3-{size}" for size in GPT3), *(f"llama3-{size}" for size in LLAMA3)]


@cache
def preset(name: str) -> Network:
    """A network that is known by name. Raises PlaitError with the nearest names where there is none."""
    key = name.lower().replace("_", "-").replace("gpt-3", "gpt3").replace("llama-3", "llama3")
    family, _, size = key.partition("-")
    if key in SIZES:
        return recipe_network(load_recipe(None, {"model": {"size": key}}), key)
    if family == "gpt3" and size in GPT3:
        return _gpt3(key, *GPT3[size])
    if family == "llama3" and size in LLAMA3:
        layers, width, heads, hidden, tokens = LLAMA3[size]
        backbone = TransformerConfig(
            width=width, layers=layers, heads=heads, kv_heads=8, head_width=width // heads, hidden=hidden,
            max_length=8192, qk_norm=False, rope_theta=5e5,
        )  # fmt: skip
        return Network(key, _text_only(backbone, 128_256, tied=False), tokens, 16e6)
    near = difflib.get_close_matches(key, PRESETS, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known are {', '.join(PRESETS)}."
    raise PlaitError(f"There is no preset '{name}'. {hint}")


def _gpt3(name: str, layers: int, width: int, heads: int, head_width: int, batch_tokens: float) -> Network:
    """A row of GPT-3's table; one whose heads do not make up the width is mended, with a warning."""
    warnings = []
    if heads * head_width != width:
        printed = (
            f"{name} is printed with width {width} and {heads} heads of {head_width}, which make {heads * head_width}"
        )
        if width % head_width == 0:
            heads = width // head_width
            warnings.append(f"{printed}; planned with {heads} heads.")
        else:
            width = heads * head_width
            warnings.append(f"{printed}; planned with width {width}.")
    backbone = TransformerConfig(
        width=width, layers=layers, heads=heads, kv_heads=heads, head_width=head_width, hidden=4 * width,
        max_length=2048, position="learned", norm="layer", activation="gelu_tanh", qk_norm=False, qkv_bias=True,
        bias=True, norm_eps=1e-5, dropout=0.1,
    )  # fmt: skip
    return Network(name, _text_only(backbone, 50_257, tied=True), 300e9, batch_tokens, tuple(warnings))


def _text_only(backbone: TransformerConfig, rows: int, tied: bool) -> ModelConfig:
    """A model of text with so many rows, special tokens among them."""
    bare = Vocabulary(text=rows, columns={}, levels={}, closers=[])
    vocabulary = bare.model_copy(update={"text": rows - len(bare.specials)})
    return ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0, tied=tied)


def recipe_network(recipe: Recipe, name: str) -> Network:
    """The network of a recipe, for coloured images, audio and text. Its backbone may come from `model.init_from`,
    whose config.json is read, and nothing else of it."""
    config = sized_config(recipe)
    if recipe.model.init_from:
        imported = _imported(find_checkpoint(recipe.model.init_from) or Path(recipe.model.init_from))
        vocabulary = config.vocabulary.model_copy(update={"text": imported.vocabulary.size})
        config = config.model_copy(
            update={"backbone": imported.backbone, "vocabulary": vocabulary, "tied": imported.tied}
        )
    size = SIZES[recipe.model.size]
    batch = (recipe.training.batch_size or size.batch_size) * config.backbone.max_length
    tokens = float(batch * recipe.training.steps) if recipe.training.steps else None
    rank = recipe.training.lora.rank if recipe.training.lora else None
    return Network(name, config, tokens, float(batch), recipe=recipe, lora=rank)


def network(source: str) -> Network:
    """What a path names: a recipe (YAML), a run, a checkpoint, or a folder with a Hugging Face config.json."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or (source in packaged_recipes() and not path.exists()):
        return recipe_network(load_recipe(source), path.stem)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / ("best" if (path / "checkpoints" / "best").exists() else "last")
    if (path / "config.json").is_file():
        is_plait = (path / "manifest.json").is_file()
        return Network(path.resolve().name, _imported(path), pretrained=not is_plait)
    if path.suffix == ".gguf" and path.is_file():
        described = imported(GGUF(path).config(), path)
        config = _text_only(described.backbone, described.size, described.tied)
        return Network(path.stem, config, pretrained=True)
    raise PlaitError(
        f"{source} is no recipe (a .yaml file or a name of `plait recipes`), run, checkpoint or folder with a "
        f"config.json. For a network that is known by name: plait plan --preset NAME, of {', '.join(PRESETS)}."
    )


def _imported(folder: Path) -> ModelConfig:
    if not (folder / "config.json").is_file():
        raise PlaitError(f"{folder} has no config.json. A plan reads only folders that are here; download it first.")
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("model_type") == "plait":
        settings = {name: value for name, value in config.items() if name in ModelConfig.model_fields}
        try:
            modalities = read_json(folder / "preprocessor_config.json")
            return ModelConfig.model_validate({**settings, "modalities": modalities})
        except ValidationError as error:
            raise PlaitError(
                f"{folder / 'config.json'} does not describe a model: {error.errors()[0]['msg']}."
            ) from None
    described = imported(config, folder / "config.json")
    return _text_only(described.backbone, described.size, described.tied)


# --- the best size for a budget ---------------------------------------------------------------------------------

# Loss(N, D) = E + A / N^a + B / D^b, in nats a token of web text. Hoffmann et al. (2022) published rounded constants
# that do not fit their own data; these are the refit of Besiroglu et al., "Chinchilla Scaling: A replication attempt"
# (2024).
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658


def expected_loss(parameters: float, tokens: float) -> float:
    """Nats a token that the fitted law expects."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def compute_optimal(flops: float) -> tuple[float, float]:
    """(parameters, tokens) with the least expected loss where 6 N D is `flops`."""
    n = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))
    return n, flops / 6 / n
