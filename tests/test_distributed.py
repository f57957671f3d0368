"""One global batch, whoever computes it: in parts, by several processes, replicated or sharded."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plait.core.config import load_recipe, parse_recipe
from plait.core.device import Device, matmul_precision
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.inference.model import PlaitModel
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import IGNORE, Multimodal
from plait.training.batches import Sampler, Step, cut_in_two
from plait.training.build import model_config
from plait.training.distributed import Group, Network
from plait.training.losses import LossModule, step_losses
from plait.training.split import Split, add_codes, load_split
from plait.training.streams import Streams, media_work
from plait.training.trainer import train
from several import SMALL, begin, interrupted_after, rows, workers, write_recipe


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


def use_manual_backward(model: Multimodal, step: Step, split: Split, restricted: bool) -> dict[str, torch.Tensor]:
    """The objectives of a whole batch, one sequence at a time, as their definition says."""
    likelihoods: dict[str, list[torch.Tensor]] = {}
    spans: dict[str, dict[int, torch.Tensor]] = {}
    for batch, owners in zip(step.batches, step.span_records, strict=True):
        inputs, hidden = model.inputs(batch), model(batch)
        for row, place in (batch.targets != IGNORE).nonzero().tolist():
            target = int(batch.targets[row, place])
            name, (start, stop) = next((n, s) for n, s in model.vocabulary.id_ranges.items() if s[0] <= target < s[1])
            table = model.output_embedding.table()
            logits = hidden[row, place] @ (table[start:stop] if restricted else table).t()
            wanted = torch.tensor(target - start * restricted)
            likelihoods.setdefault(name, []).append(F.cross_entropy(logits, wanted))
        for (row, name, start, stop), owner in zip(batch.spans, owners.tolist(), strict=True):
            if owner >= 0:
                mean = hidden[row, start:stop].mean(0)
                if name != "text":
                    mean = mean + F.rms_norm(inputs[row, start:stop], inputs.shape[-1:]).mean(0)
                spans.setdefault(name, {}).setdefault(owner, F.normalize(model.project(mean), dim=-1))
    losses = {name: torch.stack(values).mean() for name, values in likelihoods.items()}
    for a, b in (("image", "text"), ("audio", "text")):
        records = sorted(spans.get(a, {}).keys() & spans.get(b, {}).keys())
        if len(records) > 1:
            same = torch.from_numpy(split.positives(np.array(records), np.array(records)))
            first, second = (torch.stack([spans[name][r] for r in records]) for name in (a, b))
            losses[f"contrastive:{'-'.join(sorted((a, b)))}"] = model.pair_loss(first, second, same, model.pair_scalars)
    return losses


@pytest.mark.parametrize("restricted", [True, False])
def test_parts_change_neither_loss_nor_gradient(parts: tuple[Multimodal, Split], restricted: bool) -> None:
    """A batch in one part, in three unequal ones, and record by record, so that most parts lack a modality."""
    model, split = parts
    sampler = Sampler(split, model.vocabulary, model.media, 11, 96, 0, 0.1, True, True)
    network = Network(LossModule(model, Device("cpu", torch.float32)))
    weights = {"image": 0.5, "contrastive": 2.0}
    wanted = use_manual_backward(model, sampler.step(1), split, restricted)
    assert "contrastive:image-text" in wanted and "contrastive:audio-text" in wanted
    model.zero_grad()
    sum(value * {"image": 0.5, "text": 1, "audio": 1}.get(name, 2.0) for name, value in wanted.items()).backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}
    for count, most in ((1, None), (3, None), (11, None), (1, 120), (3, 60)):
        model.zero_grad()
        sampler.max_tokens = most
        pieces = [one for part in range(count) for one in sampler.step(1, part, count).passes(most)]
        sizes = [[len(tokens) for batch in one.batches for tokens in batch.tokens] for one in pieces]
        assert most is None or (len(pieces) > 2 * count and all(sum(one) <= most or len(one) == 1 for one in sizes))
        losses, _ = step_losses(network, pieces, split, Group(), restricted, weights)
        assert losses.keys() == wanted.keys()
        assert all(math.isclose(losses[name], float(wanted[name].detach()), rel_tol=1e-5) for name in wanted)
        for name, parameter in named.items():
            assert parameter.grad is not None, name  # also of a modality that no part has
            off = (parameter.grad - expected[name]).norm()
            assert off <= 1e-4 * expected[name].norm() + 1e-6, (count, name, off)


def test_two_threads_change_neither_loss_nor_gradient(parts: tuple[Multimodal, Split]) -> None:
    """A step cut in two of equal work, a thread for each half: the gradients of the whole, and the same each time."""
    model, split = parts
    plain, cut = (Sampler(split, model.vocabulary, model.media, 11, 96, 0, 0.1, True, True) for _ in range(2))
    cut.media_work = media_work(model)
    assert set(cut.media_work) == {"image", "audio"} and min(cut.media_work.values()) > 0
    network, named = Network(LossModule(model, Device("cpu", torch.float32))), dict(model.named_parameters())
    found = []
    for streams, sampler, most in (
        (Streams(), plain, None),
        (Streams(2), cut, None),
        (Streams(2), cut, None),
        (Streams(2), cut, 150),
    ):
        model.zero_grad()
        sampler.max_tokens = most
        passes = sampler.step(1).passes(most)
        assert max(len(streams.halves(one)) for one in passes) == (1 if sampler is plain else 2)
        assert (len(passes) > 1) == (most is not None)
        with matmul_precision(Device("cpu", torch.float32)):  # of the process, as in training
            losses, tokens = step_losses(network, passes, split, Group(), True, {"contrastive": 2.0}, streams=streams)
        found.append((losses, tokens, {n: p.grad.clone() for n, p in named.items() if p.grad is not None}))
        streams.close()
    (losses, tokens, wanted), *halved = found
    for others, others_tokens, gradients in halved:
        assert others == pytest.approx(losses, rel=1e-5) and others_tokens == tokens
        assert gradients.keys() == wanted.keys()
        assert all((gradients[n] - wanted[n]).norm() <= 1e-4 * wanted[n].norm() + 1e-6 for n in wanted)
    (_, _, first), (_, _, second), _ = halved
    assert [n for n in wanted if not torch.equal(first[n], second[n])] == []


def test_where_a_step_is_cut_in_two() -> None:
    lengths, more = [4, 4, 4, 4, 30, 30], [9.0, 9.0, 9.0, 9.0, 0.0, 0.0]
    assert cut_in_two(lengths, more) == 4  # 52 and 60 tokens; one further would be 145 and 30
    assert cut_in_two([1, 5], [0.0, 0.0]) == 1


def test_what_is_only_read_still_meets_its_text(parts: tuple[Multimodal, Split]) -> None:
    model, split = parts
    unwritten = frozenset({"image"})
    step = Sampler(split, model.vocabulary, model.media, 11, 96, 0, 0.1, True, True, unwritten).step(1)
    losses = use_manual_backward(model, step, split, True)
    assert "contrastive:image-text" in losses and "image" not in losses
    measured, _ = step_losses(Network(LossModule(model, Device("cpu", torch.float32))), [step], split, Group())
    assert measured == pytest.approx({name: float(value.detach()) for name, value in losses.items()}, rel=1e-5)
    text = Text.train(["one", "two"], 280)
    reader = Multimodal(model.config.model_copy(update={"read_only": ["image"]}))
    used = PlaitModel(Checkpoint(reader, text), "cpu")
    assert "draw" not in used.verbs and "speak" in used.verbs
    with pytest.raises(PlaitError, match=r"training\.weights\.image: 0"):
        used.draw("one")


# --- the real command -------------------------------------------------------------------------------------------


def same(run: Path, other: Path) -> None:
    """Every step had the same records, and the same loss."""
    mine, theirs = rows(run), rows(other)
    assert [row["records"] for row in mine] == [row["records"] for row in theirs]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, plait: Callable[..., int]) -> Path:
    """The run of one process that the others are compared with."""
    assert plait("train", prepared / "data", "-o", prepared / "one", "--recipe", write_recipe(prepared)) == 0
    return prepared / "one"


def test_one_process_two_and_one_again(prepared: Path, undisturbed: Path, plait: Callable[..., int]) -> None:
    """Sharded over two processes with one record a part, so that most parts lack images or audio; SIGTERM."""
    run, recipe = prepared / "sharded", prepared / "recipe.yaml"
    with pytest.raises(KeyboardInterrupt):
        train(Dataset.open(prepared / "data"), run, load_recipe(recipe), interrupted_after(10))
    assert len(rows(run)) == 10
    started = begin(prepared / "data", run, recipe, "--parallel", "fsdp", "--grad-accum-steps", 2, after=14)
    started.terminate()
    told, _ = started.communicate(timeout=600)
    assert "Traceback" not in told
    done = len(rows(run))
    if done < 40:  # else it was faster than this test
        assert started.returncode == 143 and f"Saved: step-{done:06d}" in told
    assert (run / "checkpoints" / "last" / "training_state").is_dir()
    assert plait("train", prepared / "data", "-o", run, "--recipe", recipe) == 0
    same(run, undisturbed)


def test_a_killed_process_takes_the_job_down_and_it_goes_on(
    prepared: Path, undisturbed: Path, plait: Callable[..., int]
) -> None:
    run, recipe = prepared / "killed", prepared / "recipe.yaml"
    started = begin(prepared / "data", run, recipe, "--save-every", 4, after=6)
    for process in workers(started.pid)[-1:]:
        os.kill(process, signal.SIGKILL)
    told, _ = started.communicate(timeout=600)
    assert started.returncode != 0 or len(rows(run)) == 40, told
    assert plait("train", prepared / "data", "-o", run, "--recipe", recipe) == 0
    same(run, undisturbed)


def test_a_batch_too_small_to_cut(prepared: Path, plait: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(prepared)
    assert plait("train", prepared / "data", "-o", prepared / "cut", "--recipe", recipe, "--grad-accum-steps", 9) == 1
    assert "cannot be cut into 9 parts" in capfd.readouterr().err
