"""Going on from a trained model with more to read and write: what is old keeps its weights, what is new gets some."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.core.errors import PlaitError
from plait.modalities.base import END, Vocabulary, same_network
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal, TokenEmbedding

MIDDLING = 16384  # rows of a table that say what a middling one is


def extend(source: Checkpoint | Multimodal, config: ModelConfig) -> Multimodal:
    """A model of `config` that goes on from `source`: its backbone and rows, and new rows for what is new.

    Rows are matched by the names of their tokens. A new row is the mean of the old text rows plus noise of a fifth of
    their spread, so that a new token starts out as likely as a middling old one; the digits of new codes are noise
    alone, of half that spread. An end of our own starts as the import's. Text ids past the tokenizer's may be left out.
    Encoders, codecs and the embedding space are kept where their settings are equal. Noise comes from torch's global
    generator. Raises PlaitError where the backbone's shape or the text ids differ.
    """
    old = source.model if isinstance(source, Checkpoint) else source
    _check(source, config)
    model = Multimodal(config)
    device = next(old.parameters()).device
    model.to(device)
    with torch.no_grad():
        kept = {name: value for name, value in old.state_dict().items() if _kept(name, value, model, old)}
        if old.config.backbone.position == "learned":
            kept["backbone.positions"] = old.backbone.positions[: config.backbone.max_length]
        model.load_state_dict(kept, strict=False)
        _extend_rows(model.token_embedding, old.token_embedding)
        if model.lm_head is not None:
            _extend_rows(model.lm_head, old.output_embedding)
    return model.train(old.training)


def extend_frozen(source: Checkpoint, config: ModelConfig) -> Multimodal:
    """`extend` for a model whose old part stays as it is: it shares the source's tensors, in the precision that they
    have, and no memory is taken but for what is new. The rows of text are held apart, frozen."""
    _check(source, config)
    old = source.model
    with torch.device("meta"):
        model = Multimodal(config)
    kept = {name: value for name, value in old.state_dict().items() if _kept(name, value, model, old)}
    if config.backbone.position == "learned":
        kept["backbone.positions"] = old.backbone.positions[: config.backbone.max_length]
    for name in config.modalities:
        settings = SETTINGS[name].model_validate(config.modalities[name])
        model.modalities[name] = MODALITIES[name](settings, config.backbone.width)
    model.load_state_dict(kept, strict=False, assign=True)
    if config.backbone.position == "rotary":
        model.backbone.set_frequencies()
    if config.embed_dim and "project.weight" not in kept:
        model.project = nn.Linear(config.backbone.width, config.embed_dim, bias=False)
        for name, value in model.pair_loss.scalars.items():
            setattr(model, name, nn.Parameter(torch.tensor(value, dtype=torch.float32)))
    tables = [(model.token_embedding, old.token_embedding)]
    if model.lm_head is not None:
        tables.append((model.lm_head, old.output_embedding))
    for new, was in tables:
        _share_rows(new, was)
    return model.requires_grad_(True).train(old.training)


def inherited(model: Multimodal, old: Multimodal) -> set[str]:
    """The names of the tensors that a model made by `extend_frozen` has of the one before and that are not trained."""
    names = {name for name, value in old.state_dict().items() if _kept(name, value, model, old)}
    names |= {"backbone.positions", "token_embedding.text_rows", "lm_head.text_rows"}
    return names - {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _share_rows(new: TokenEmbedding, old: TokenEmbedding) -> None:
    """The rows of a table that was built without memory: text's are the old ones themselves."""
    text, width = new.vocabulary.text, old.free.shape[1]
    rest = TokenEmbedding(new.vocabulary.model_copy(update={"text": 0, "end_id": None}), width, 1.0)
    known = old.free[: min(text, MIDDLING)].float()
    with torch.no_grad():
        for name in new.digits:
            new.digits[name] = nn.Parameter(torch.empty_like(rest.digits[name]))
            new.register_buffer(f"places_{name}", getattr(rest, f"places_{name}"), persistent=False)
        rows = torch.empty(new.vocabulary.size - text, width)
        _fill_rows(new, old, rows, known.mean(0), known.std(0))
    new.text_rows = old.free.detach()[:text]
    new.free = nn.Parameter(rows)


def _check(source: Checkpoint | Multimodal, config: ModelConfig) -> None:
    """Raise PlaitError where a model of `config` cannot go on from `source`."""
    old = source.model if isinstance(source, Checkpoint) else source
    was, now = old.config, config
    free = {"max_length", "dropout"}
    before, after = was.backbone.model_dump(exclude=free), now.backbone.model_dump(exclude=free)
    if odd := [key for key in before if before[key] != after[key]]:
        key = odd[0]
        raise PlaitError(f"init_from: the model's {key} is {before[key]}, the recipe's {after[key]}. Make them equal.")
    if was.backbone.position == "learned" and now.backbone.max_length > was.backbone.max_length:
        raise PlaitError(
            f"init_from: the model knows {was.backbone.max_length} positions, the recipe wants "
            f"{now.backbone.max_length}. Lower max_length."
        )
    used = source.text.size if isinstance(source, Checkpoint) else 1
    if not used <= now.vocabulary.text <= was.vocabulary.text or now.vocabulary.end_id not in (
        None,
        was.vocabulary.end_id,
    ):
        raise PlaitError("init_from: the recipe's text vocabulary is not the model's. Use the model's tokenizer.")
    if now.tied and not was.tied:
        raise PlaitError("init_from: the model has a head of its own (tied: false). Set tied: false in the recipe.")


def _kept(name: str, value: Tensor, model: Multimodal, old: Multimodal) -> bool:
    if name.startswith(("token_embedding.", "lm_head.")):
        return False
    if name.startswith("modalities."):
        modality = name.split(".")[1]
        return kept_modality(model, old, modality)
    parameter = dict(model.named_parameters()).get(name)
    return parameter is None or parameter.shape == value.shape


def kept_modality(model: Multimodal, old: Multimodal, name: str) -> bool:
    """Whether a grown model's encoder and codec are those of the old one: both have it, with settings that make the
    same network."""
    return (
        name in model.modalities
        and name in old.modalities
        and same_network(model.media[name].settings, old.media[name].settings)
    )


def old_rows(now: Vocabulary, was: Vocabulary) -> Tensor:
    """(V,), True for the tokens that a model of vocabulary `was` had before it was extended to `now`."""
    known = {*was.names(), END}
    names = now.names()
    same = [name in known and _same_code(name, now, was) for name in names]
    return torch.tensor([*[True] * now.text, *same])


def freeze(model: Multimodal, parts: set[str], was: Vocabulary, kept: set[str], touched: set[str]) -> int:
    """Take out of training what a model brought from the one that it was extended from, part by part. Returns how many
    of the parameters that are still trainable stay as they are all the same: old rows of tables that have new ones.

    `parts` are "encoder" (of all modalities), "encoder.image" and the like, "backbone" and "token_embedding"; `was` is
    the vocabulary and `kept` are the modalities that it came with. What is new is trained in any case; an encoder that
    came and whose modality is not among the `touched` ones is frozen, since nothing but decay would move it.
    """
    for name, modality in model.media.items():
        chosen = not parts.isdisjoint({"encoder", f"encoder.{name}"}) or name not in touched
        if name in kept and chosen:
            modality.encoder.requires_grad_(False)
    if "backbone" in parts:
        model.backbone.requires_grad_(False)
    masked = 0
    if "token_embedding" in parts:
        old = old_rows(model.vocabulary, was)
        for rows in [model.token_embedding] if model.lm_head is None else [model.token_embedding, model.lm_head]:
            same = old if rows.text_rows is None else old[model.vocabulary.text :]
            if bool(same.all()):
                rows.free.requires_grad_(False)
            else:
                rows.free.register_hook(_MaskedGrad(same))  # AdamW leaves a row alone that never had a gradient
                masked += int(same.sum()) * rows.free.shape[1]
            for name, digits in rows.digits.items():
                if was.levels.get(name) == model.vocabulary.levels[name]:
                    digits.requires_grad_(False)
    return masked


class _MaskedGrad:
    """A gradient without its part in some rows."""

    def __init__(self, rows: Tensor) -> None:
        self.token_embedding = rows[:, None]

    def __call__(self, grad: Tensor) -> Tensor:
        self.token_embedding = self.token_embedding.to(grad.device)
        return grad.masked_fill(self.token_embedding, 0)


def _extend_rows(new: TokenEmbedding, old: TokenEmbedding) -> None:
    text = new.vocabulary.text
    known = old.free[:text]
    new.free[:text] = known
    _fill_rows(new, old, new.free[text:], known.mean(0), known.std(0))


def _fill_rows(new: TokenEmbedding, old: TokenEmbedding, rows: Tensor, mean: Tensor, spread: Tensor) -> None:
    """The `rows` of ids beyond text: the old ones by name, and for new ones `mean` and noise of a fifth of `spread`."""
    places = {name: id for id, name in enumerate(old.vocabulary.names(), old.vocabulary.text)}
    places[END] = old.vocabulary.end
    for i, name in enumerate(new.vocabulary.names()):
        place = places.get(name)
        same = place is not None and _same_code(name, new.vocabulary, old.vocabulary)
        # An import's own end and padding rows are zero: nothing was learned there.
        if same and place is not None and bool(old.free[place].any()):
            rows[i] = old.free[place]
        else:
            rows[i] = mean + 0.2 * spread * torch.randn_like(mean)
    for modality, digits in new.digits.items():
        levels = new.vocabulary.levels[modality]
        if old.vocabulary.levels.get(modality) == levels:
            digits.copy_(old.digits[modality])
        else:
            digits.copy_(0.5 * spread / len(levels) ** 0.5 * torch.randn_like(digits))


def _same_code(name: str, new: Vocabulary, old: Vocabulary) -> bool:
    """Whether a token of this name means the same in both: a code does only under equal levels."""
    modality = name[2:-2].split(":")[0]
    if ":" not in name or modality not in new.levels:
        return True
    return new.levels[modality] == old.levels.get(modality)
