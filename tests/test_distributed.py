"""One global batch, whoever computes it: in parts, by several processes, replicated or sharded."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from conftest import RECIPE
from plait.applications.model import Model
from plait.config import parse_recipe
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import IGNORE, Multimodal
from plait.model.objectives import contrastive
from plait.runtime import Device, PlaitError
from plait.training.batches import Sampler, Split, Step, add_codes, load_split
from plait.training.distributed import Group, Network
from plait.training.losses import Passes, step_losses
from plait.training.setup import model_config

SMALL = {**yaml.safe_load(RECIPE)["model"], "backbone": {"width": 32, "layers": 2, "heads": 2, "context": 96}}


@pytest.fixture(scope="module")
def prepared(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    prepare(world, folder / "data")
    return folder


@pytest.fixture(scope="module")
def parts(prepared: Path) -> tuple[Multimodal, Split]:
    dataset = Dataset.open(prepared / "data")
    text = Text.train((t for c in ("en", "zh") for t in dataset.texts(c) if t), 280)
    torch.manual_seed(0)
    model = Multimodal(model_config(parse_recipe({"model": SMALL}, "test"), dataset, text.size, None))
    for modality in model.media.values():
        modality.codec.eval().requires_grad_(False)
    split = load_split(dataset, "train", text, model.media, prepared / "cache", 96)
    add_codes(split, dataset.columns, model.media, prepared / "cache", "train", True)
    return model, split


def by_hand(model: Multimodal, step: Step, split: Split, restricted: bool) -> dict[str, torch.Tensor]:
    """The objectives of a whole batch, one sequence at a time, as their definition says."""
    likelihoods: dict[str, list[torch.Tensor]] = {}
    spans: dict[str, dict[int, torch.Tensor]] = {}
    for batch, owners in zip(step.batches, step.span_records, strict=True):
        hidden = model(batch)
        for row, place in (batch.targets != IGNORE).nonzero().tolist():
            target = int(batch.targets[row, place])
            name, (start, stop) = next((n, s) for n, s in model.vocabulary.spaces.items() if s[0] <= target < s[1])
            table = model.predicting.table()
            logits = hidden[row, place] @ (table[start:stop] if restricted else table).t()
            wanted = torch.tensor(target - start * restricted)
            likelihoods.setdefault(name, []).append(F.cross_entropy(logits, wanted))
        for (row, name, start, stop), owner in zip(batch.spans, owners.tolist(), strict=True):
            if owner >= 0:
                mean = F.normalize(model.project(hidden[row, start:stop].mean(0)), dim=-1)
                spans.setdefault(name, {}).setdefault(owner, mean)
    losses = {name: torch.stack(values).mean() for name, values in likelihoods.items()}
    for a, b in (("image", "text"), ("audio", "text")):
        records = sorted(spans.get(a, {}).keys() & spans.get(b, {}).keys())
        if len(records) > 1:
            same = torch.from_numpy(split.positives(np.array(records), np.array(records)))
            first, second = (torch.stack([spans[name][r] for r in records]) for name in (a, b))
            losses[f"contrastive:{'-'.join(sorted((a, b)))}"] = contrastive(first, second, same, model.log_temperature)
    return losses


@pytest.mark.parametrize("restricted", [True, False])
def test_parts_change_neither_loss_nor_gradient(parts: tuple[Multimodal, Split], restricted: bool) -> None:
    """A batch in one part, in three unequal ones, and record by record, so that most parts lack a modality."""
    model, split = parts
    sampler = Sampler(split, model.vocabulary, model.media, 11, 96, 0, 0.1, True, True)
    network = Network(Passes(model, Device("cpu", torch.float32)))
    weights = {"image": 0.5, "contrastive": 2.0}
    wanted = by_hand(model, sampler.step(1), split, restricted)
    assert "contrastive:image-text" in wanted and "contrastive:audio-text" in wanted
    model.zero_grad()
    sum(value * {"image": 0.5, "text": 1, "audio": 1}.get(name, 2.0) for name, value in wanted.items()).backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}
    for count in (1, 3, 11):
        model.zero_grad()
        pieces = [sampler.step(1, part, count) for part in range(count)]
        losses, _ = step_losses(network, pieces, split, Group(), restricted, weights)
        assert losses.keys() == wanted.keys()
        assert all(math.isclose(losses[name], float(wanted[name].detach()), rel_tol=1e-5) for name in wanted)
        for name, parameter in named.items():
            assert parameter.grad is not None, name  # also of a modality that no part has
            off = (parameter.grad - expected[name]).norm()
            assert off <= 1e-4 * expected[name].norm() + 1e-6, (count, name, off)


def test_what_is_only_read_still_meets_its_text(parts: tuple[Multimodal, Split]) -> None:
    model, split = parts
    unwritten = frozenset({"image"})
    step = Sampler(split, model.vocabulary, model.media, 11, 96, 0, 0.1, True, True, unwritten).step(1)
    losses = by_hand(model, step, split, True)
    assert "contrastive:image-text" in losses and "image" not in losses
    measured, _ = step_losses(Network(Passes(model, Device("cpu", torch.float32))), [step], split, Group())
    assert measured == pytest.approx({name: float(value.detach()) for name, value in losses.items()}, rel=1e-5)
    text = Text.train(["one", "two"], 280)
    reader = Multimodal(model.config.model_copy(update={"read_only": ["image"]}))
    used = Model(Checkpoint(reader, text), "cpu")
    assert "draw" not in used.verbs and "speak" in used.verbs
    with pytest.raises(PlaitError, match=r"training\.weights\.image: 0"):
        used.draw("one")
