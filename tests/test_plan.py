"""Plans against published figures, closed forms, and what torch really allocates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.model import lora
from plait.model.multimodal import Multimodal
from plait.planning import failures, use
from plait.planning.machines import MACHINES, Machine, machine, sample_batch, traced_peak
from plait.planning.memory import Layout, Load, layer_activations, layouts, memory, smallest_change, total
from plait.planning.networks import compute_optimal, expected_loss, preset

Plait = Callable[..., int]

# N = V d + T d + L (12 d^2 + 13 d) + 2 d, with the widths that fit.
GPT3 = {
    "small": 125_226_240, "medium": 355_871_744, "large": 760_300_032, "xl": 1_315_723_264, "2.7b": 2_651_553_280,
    "6.7b": 6_658_404_352, "13b": 12_853_386_240, "175b": 174_604_259_328,
}  # fmt: skip


@pytest.fixture
def plan(plait: Plait, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    def run(*arguments: object) -> dict:
        assert plait("plan", *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("size", GPT3)
def test_gpt3_parameters_are_exact_and_rows_that_do_not_fit_are_told(size: str) -> None:
    network = preset(f"GPT3-{size}")
    assert network.parameters == GPT3[size]
    assert bool(network.warnings) == (size in ("xl", "13b"))


def test_llama_parameters_are_those_of_its_files() -> None:
    assert preset("llama3-8b").parameters == 8_030_261_248
    assert preset("llama3-405b").parameters == 405_853_388_800


def test_parts_add_up_to_the_real_network() -> None:
    network = preset("tiny")
    assert network.parameters == sum(p.numel() for p in Multimodal(network.config).parameters())


def test_gpt3_175b_flops_days_money_and_cache(plan: Callable[..., dict]) -> None:
    made = plan("--preset", "gpt3-175b", "--gpus", 1024, "--gpu", "a100", "--tflops", 140, "--activation-checkpointing",
                "full", "--price", 3)  # fmt: skip
    run = made["run"]
    assert run["FLOPs, 6 N D"] == pytest.approx(3.14e23, rel=0.01)
    assert run["FLOPs, with attention"] == pytest.approx(3.23e23, rel=0.01)
    assert run["FLOPs a token, with attention"] == pytest.approx(1.077e12, rel=0.01)
    assert run["days"] == pytest.approx(33.9, rel=0.01)
    assert run["cost"] == pytest.approx(run["days"] * 24 * 1024 * 3)
    assert made["KV cache"]["2048 tokens"] == pytest.approx(9.66e9, rel=0.01)
    megascale = plan("--preset", "gpt3-175b", "--gpus", 12288, "--gpu", "a100", "--utilisation", 0.552)["run"]
    assert megascale["days"] == pytest.approx(1.75, rel=0.02)


@pytest.mark.parametrize(
    ("tensor", "sequence", "activation_checkpointing", "gigabytes"),
    [(1, False, "none", 2.869), (8, False, "none", 0.579), (8, True, "none", 0.359), (8, True, "selective", 0.107),
     (8, True, "full", 0.050)],
)  # fmt: skip
def test_activations_of_gpt3_175b(tensor: int, sequence: bool, activation_checkpointing: str, gigabytes: float) -> None:
    config = preset("gpt3-175b").config.backbone
    found = layer_activations(config, Load(1, 2048, activation_checkpointing), tensor, sequence)
    assert found / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_states_are_16_bytes_a_parameter_and_sharded_evenly() -> None:
    network = preset("gpt3-175b")
    for ranks, gigabytes in [(1, 2793.7), (64, 43.7), (512, 5.46)]:
        kinds = memory(network, Layout("fsdp", ranks, sharded=True), Load(1, 2048))
        states = sum(kinds[kind] for kind in ("weights", "gradients", "optimizer"))
        assert states / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert kinds["gathered block"] / 1e9 == pytest.approx(3.62, rel=0.01)


def test_compute_optimal_is_the_least_loss_on_its_budget() -> None:
    for flops in (1e19, 5.76e23):
        best, tokens = compute_optimal(flops)
        assert 6 * best * tokens == pytest.approx(flops)
        for other in best * np.geomspace(0.2, 5, 41):
            assert expected_loss(best, tokens) <= expected_loss(other, flops / 6 / other) + 1e-12
    assert 15 < compute_optimal(5.76e23)[1] / compute_optimal(5.76e23)[0] < 25  # tokens a parameter: some 20


def test_a_budget_in_money_days_or_flops(plan: Callable[..., dict]) -> None:
    common = ("--preset", "gpt3-small", "--gpu", "h100", "--gpus", 8, "--price", 2)
    days = plan(*common, "--budget", "10d")["compute-optimal"]
    money = plan(*common, "--budget", f"${10 * 24 * 8 * 2}")["compute-optimal"]
    flops = plan(*common, "--budget", f"{days['FLOPs']:.6e}")["compute-optimal"]
    assert days["parameters"] == pytest.approx(money["parameters"])
    assert days["parameters"] == pytest.approx(flops["parameters"], rel=1e-4)


# --- memory against torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation_checkpointing", "rank"), [(False, None), (True, None), (False, 8)])
def test_a_traced_step_holds_what_torch_allocates(activation_checkpointing: bool, rank: int | None) -> None:
    """The oracle is torch's own profiler of memory, over a real step, from which the peak is added up."""
    from plait.training.losses import LossModule
    from plait.training.optimizer import make_optimizer

    config = preset("tiny").config.model_copy(update={"modalities": {}})
    device = Device("cpu", torch.float32)
    model = Multimodal(config)
    if rank:
        model.requires_grad_(False)
        lora.adapt(model.backbone, rank, 16.0)
    model.backbone.set_activation_checkpointing(activation_checkpointing)
    seen = sample_batch(model, 4, 128)
    optimizer = make_optimizer([model], 1e-4, 0.1, (0.9, 0.95))

    def step() -> None:
        from plait.training.batches import Step

        nothing = np.zeros(0, np.int64)
        output = LossModule(model, device)(Step([seen], [nothing], nothing), True, False)
        output.sums["text"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = np.cumsum([event.nbytes() for event in events])
    states = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())
    assert traced_peak(config, 4, 128, device, activation_checkpointing, rank) == pytest.approx(
        states + live.max(), rel=0.05
    )


def test_low_rank_updates_are_counted(plan: Callable[..., dict]) -> None:
    tiny = replace(preset("tiny"), lora=8)
    model = Multimodal(tiny.config)
    lora.adapt(model.backbone, 8, 16.0)
    assert tiny.updates == sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)

    options = (
        "--preset",
        "llama3-8b",
        "--gpu",
        "h100",
        "--data-tokens",
        1e8,
        "--activation-checkpointing",
        "selective",
    )
    whole, low = (plan(*options, *more) for more in ((), ("--lora", 16)))
    n, updates = whole["parameters"], low["low-rank updates"]
    kinds = low["layouts"][0]["memory"]
    assert low["parameters"] == n and kinds["weights"] == 2 * (n + updates) and kinds["optimizer"] == 12 * updates
    assert kinds["gradients"] == 2 * updates
    assert low["run"]["days"] / whole["run"]["days"] == pytest.approx(2 / 3, rel=0.01)
    assert not whole["layouts"][0]["fits"] and low["layouts"][0]["fits"]


def test_layouts_that_share_more_hold_less() -> None:
    network, load = preset("llama3-70b"), Load(1, 4096)
    sizes = {layout.name: total(network, layout, load) for layout in layouts(network, 64)}
    assert sizes["one"] == sizes["ddp"] > sizes["tensor"] > sizes["sequence"] > sizes["sequence+fsdp"]
    none, selective, full = (total(network, Layout("one"), Load(1, 4096, way)) for way in ("none", "selective", "full"))
    assert none > selective > full


def test_this_machine_is_traced_and_probed(plan: Callable[..., dict], tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {backbone: {width: 32, layers: 5, heads: 2, context: 64}}\ntraining: {steps: 100}\n")
    made = plan(recipe, "--batch", 4)
    here = made["here"]
    assert here["fits"] and here["peak"] > 16 * made["parameters"]
    assert made["run"]["tokens"] == 100 * 32 * 64
    assert made["run"]["days"] * 86_400 == pytest.approx(100 * 32 * 64 / here["tokens/s"])
    assert here["largest batch"] > 4
    assert "tiny" in made["this machine"]["trains"] and "gpt3-175b" not in made["this machine"]["runs in bf16"]


def test_a_run_and_a_hugging_face_folder_can_be_planned(
    plan: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(use, "SIDE", 256)
    made = plan(tmp_path)
    assert made["parameters"] == 124_439_808 and made["machine"]["name"].startswith("this machine")
    rows = {row["precision"]: row for row in made["use"]}
    assert rows["fp32"]["weights"] == 4 * 124_439_808 and rows["int8"]["in use"] < rows["bf16"]["in use"]
    assert all(row["tokens/s"] > 0 and row["prompt tokens/s"] > 0 for row in rows.values())


def test_an_encoder_says_what_it_weighs(plan: Callable[..., dict], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    made = plan(tmp_path)
    assert made["parameters"] == model.num_parameters()
    assert [row["precision"] for row in made["use"]] == ["fp32", "bf16"] and "embed" in made["what for"]["verbs"]


# --- failures ---------------------------------------------------------------------------------------------------


def test_simulated_failures_agree_with_the_closed_form() -> None:
    trouble = failures.FailureRates(between=10_000, save=60, restart=600)
    for interval in (300.0, 1000.0, 4000.0):
        work = interval * 500
        elapsed = failures.simulate(work, interval, trouble, seed=3, runs=400)
        error = elapsed.std() / math.sqrt(len(elapsed))
        assert abs(elapsed.mean() - work / failures.expected_goodput(trouble, interval)) < 4 * error + trouble.restart
        assert elapsed.min() >= work


def test_the_best_interval_is_near_young_and_daly() -> None:
    trouble = failures.FailureRates(between=20_000, save=40, restart=300)
    best = failures.best_interval(40 * 86_400, trouble)
    for other in (failures.young(trouble), failures.daly(trouble)):
        assert failures.expected_goodput(trouble, best) > failures.expected_goodput(trouble, other) - 0.002


def test_goodput_of_llama_3_405b(plan: Callable[..., dict]) -> None:
    made = plan("--preset", "llama3-405b", "--gpus", 16384, "--gpu", "h100", "--utilisation", 0.41, "--failures",
                "--interruptions", 466, "--in-days", 54)  # fmt: skip
    assert 25e6 < made["run"]["device hours"] < 28e6
    found = made["failures"]
    low, high = found["goodput, 5 to 95 %"]
    assert 0.80 < low < found["goodput"] < high < 0.95
    assert found["days, 5 to 95 %"][0] < found["days"] < found["days, 5 to 95 %"][1]
    assert found["days"] == pytest.approx(made["run"]["days"] / found["goodput"])


def test_more_machines_fail_more_often(plan: Callable[..., dict]) -> None:
    common = ("--preset", "gpt3-175b", "--gpu", "h100", "--gpus", 1024, "--failures", "--mtbf", 20_000)
    goodputs = [plan(*common, "--machines", count)["failures"]["goodput"] for count in (16, 128, 1024)]
    assert all(more > less for more, less in pairwise(goodputs))


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "gpt3-157b"], "Did you mean gpt3-175b"),
        (["--preset", "gpt3-small", "--gpu", "h1000"], "Did you mean h100"),
        ([], "Say what to plan"),
        (["nothing.yaml"], "cannot be read"),
        (["nothing"], "no recipe"),
        (["--preset", "gpt3-small", "--length", "4096"], "context of 2048"),
        (["--preset", "gpt3-small", "--utilisation", "1.5"], "150%"),
        (["--preset", "gpt3-small", "--layout", "tensor"], "allow the layouts one"),
        (["--preset", "gpt3-small", "--budget", "cheap"], "not understood"),
        (["--preset", "gpt3-small", "--budget", "$100"], "needs --price"),
        (["--preset", "gpt3-small", "--failures"], "how often machines fail"),
        (["--preset", "gpt3-small", "--failures", "--mtbf", "0.1", "--every", "600"], "does not end"),
    ],
)
def test_mistakes_end_in_a_message(
    plait: Plait, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert plait("plan", *arguments) == 1
    assert words in capsys.readouterr().err


def test_a_layout_that_cannot_fit_names_the_part_and_a_change_that_fits(
    plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--preset",
        "gpt3-175b",
        "--gpus",
        "8",
        "--gpu",
        "h100",
        "--layout",
        "fsdp",
        "--activation-checkpointing",
        "selective",
    ]
    assert plait("plan", *command) == 1
    told = capsys.readouterr().err
    assert "The largest part is optimizer" in told and "too large by itself" in told
    change = told.partition("The smallest change that fits: ")[2].strip().rstrip(".").split()
    assert plait("plan", *command, *change) == 0
    tight = ["--preset", "gpt3-2.7b", "--gpus", "8", "--gpu", "h100", "--layout", "fsdp", "--batch", "8"]
    assert plait("plan", *tight) == 1
    assert "The smallest change that fits: --activation-checkpointing selective." in capsys.readouterr().err


def test_what_this_machine_cannot_hold_another_can() -> None:
    here = Machine("here", 1e12, 16e9, 0, 0)
    change = smallest_change(preset("gpt3-2.7b"), Layout("one"), Load(1, 2048), here)
    assert change is not None and change.startswith("--gpu ")


def test_the_documented_table_of_machines_is_the_one_that_plans_use() -> None:
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    for name, m in MACHINES.items():
        figures = (m.flops / 1e12, m.memory / 1e9, m.bandwidth / 1e9, m.watts)
        assert f"| {name} | {m.name} | {' | '.join(f'{figure:g}' for figure in figures)} |" in page
    with pytest.raises(PlaitError, match="Known are here"):
        machine("?")
