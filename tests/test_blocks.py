"""Texts that are tokenised while training goes on: their order against an independent count; stopped runs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from plait.core.config import parse_recipe
from plait.core.errors import PlaitError
from plait.data.blocks import BlockPlan, ClosedError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.training.batches import Sampler
from plait.training.callbacks import Callback, StepEvent
from plait.training.run import Progress
from plait.training.split import BlockSettings, Split, load_blocks, load_split
from plait.training.tokenising import TokeniseJob, TokeniseProcess
from plait.training.trainer import train

WORDS = ["harbour", "lantern", "quiet", "river", "stone", "teal", "under", "violet", "winter", "yonder"]
BLOCK = 1 << 16
CONTEXT = 64
RECIPE = {
    "model": {"backbone": {"width": 16, "layers": 1, "heads": 2, "context": CONTEXT}, "text": {"vocabulary": 280}},
    "training": {"task": "language", "steps": 30, "batch_size": 600, "validations": 1, "save_every": 10, "seed": 3,
                 "log_records": True, "block_megabytes": 1, "precision": "fp32"},
}  # fmt: skip


def write_texts(folder: Path, count: int, size: int) -> Dataset:
    """Texts of some `size` words, each another."""
    draw = random.Random(0)
    rows = [{"id": f"r{n}", "text": f"{n} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 2 * size)))}
            for n in range(count)]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "t.jsonl", folder / f"data{count}", workers=0, near_duplicates=False)
    return Dataset.open(folder / f"data{count}")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_texts(tmp_path_factory.mktemp("texts"), 6_000, 10)


def test_each_record_stands_in_one_block() -> None:
    plan = BlockPlan(np.array([0, 4, 7, 8, 20, 21]), 2)
    assert [plan.records(block).tolist() for block in range(2)] == [[0, 1, 2, 3, 7, 20], [4, 5, 6, *range(8, 20)]]
    for block in range(2):
        assert [plan.find(record) for record in plan.records(block)] == [
            (block, place) for place in range(len(plan.records(block)))
        ]


def test_an_epoch_takes_block_after_block_and_each_window_once(texts: Dataset, tmp_path: Path) -> None:
    text = Text.train(WORDS * 20, 300)
    plain = load_split(texts, "train", text, {}, tmp_path / "plain", CONTEXT)
    split = load_blocks(texts, "train", text, tmp_path, CONTEXT, BlockSettings(BLOCK, True, 1, lambda note: None))
    assert split.blocks is not None
    words = Vocabulary(text=text.size, columns={"text": "text"}, levels={}, closers=[])

    def sampler(of: Split) -> Sampler:
        return Sampler(of, words, {}, 50, CONTEXT, 7, 0.0, False)

    blocked, whole = sampler(split), sampler(plain)
    count = len(split.blocks)
    assert count > 3 and not split.blocks.files.is_there(count - 1)
    groups = np.concatenate(([0], np.cumsum(texts.group_sizes("train"))))
    block_of = {r: g % count for g in range(len(groups) - 1) for r in range(groups[g], groups[g + 1])}
    steps = len(whole.items) // 50
    seen = np.concatenate([blocked.members(step)[1] for step in range(steps)])
    wanted = {tuple(item) for item in whole.items[np.arange(len(whole.items))].tolist()}
    assert len(seen) == steps * 50 and {tuple(item) for item in seen.tolist()} <= wanted
    assert len(np.unique(seen, axis=0)) == len(seen)
    passed = [block_of[record] for record in seen[:, 0]]
    assert passed == sorted(passed) and set(passed) == set(range(count))
    in_first = [record for record, block in zip(seen[:, 0], passed, strict=True) if block == 0]
    assert in_first != sorted(in_first)
    assert [split.texts["text"][r] for r in seen[:200, 0]] == [plain.texts["text"][r] for r in seen[:200, 0]]
    epochs, second = blocked.members(steps + 1)
    assert (epochs == 1).all() and len({block_of[record] for record in second[:, 0]}) > 1
    again = sampler(split)  # which finds all blocks there
    for step in (0, steps - 1, steps + 1):
        assert np.array_equal(again.members(step)[1], blocked.members(step)[1])
    np.testing.assert_array_equal(split.texts["text"].lengths, plain.texts["text"].lengths)
    split.blocks.close()


def test_a_first_batch_may_need_all_blocks_and_waiting_holds_nobody(texts: Dataset, tmp_path: Path) -> None:
    text = Text.train(WORDS * 20, 300)
    words = Vocabulary(text=text.size, columns={"text": "text"}, levels={}, closers=[])
    whole = load_blocks(texts, "train", text, tmp_path, CONTEXT, BlockSettings(BLOCK, True, 1, lambda note: None))
    assert whole.blocks is not None
    large = Sampler(whole, words, {}, 100_000, CONTEXT, 7, 0.0, False)
    _, items = large.members(0)
    assert large.batch_size == len(large.items) == len(np.unique(items, axis=0))
    whole.blocks.close()
    last = len(whole.blocks) - 1
    (tmp_path / f"train-block-{last:05d}.json").unlink()
    split = load_blocks(texts, "train", text, tmp_path, CONTEXT, BlockSettings(BLOCK, False, 1, lambda note: None))
    assert split.blocks is not None
    sampler = Sampler(split, words, {}, 50, CONTEXT, 7, 0.0, False)
    step = len(large.items) // 50 - 1
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(sampler.members, step)
        asked = threads.submit(sampler.is_ready, step)
        try:
            assert asked.result(20) is False and not waiting.done()
        finally:
            split.blocks.close()
        with pytest.raises(ClosedError):
            waiting.result(20)


def test_runs_share_a_cache_beside_a_file_named_like_pythons(
    texts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text.train(WORDS * 20, 300)
    (tmp_path / "tokenize.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    settings = BlockSettings(BLOCK, True, 1, lambda note: None)
    slow, fast = (load_blocks(texts, "train", text, tmp_path / "cache", CONTEXT, settings).blocks for _ in range(2))
    assert slow is not None and fast is not None  # `slow` asks for no more than the first few
    last = len(fast) - 1
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fast.wait, last)
        try:
            waiting.result(60)
        finally:
            slow.close()
            fast.close()
    assert isinstance(fast.maker, TokeniseProcess)
    fast.maker.want(last)
    assert fast.maker.process is None
    open_files = 0 if os.name == "nt" else psutil.Process().num_fds()
    tokens = [fast[block]["text"] for block in range(len(fast))]
    assert sum(map(len, tokens)) == len(texts.indices("train"))
    if os.name != "nt":
        assert psutil.Process().num_fds() == open_files


def test_what_the_process_that_tokenises_says_is_kept(texts: Dataset, tmp_path: Path) -> None:
    job = TokeniseJob(str(tmp_path / "none"), "train", ["text"], str(tmp_path), "{", "", "", BLOCK)
    for wrong, words in ((job, "none"), (replace(job, dataset=str(texts.path)), "Tokenising failed")):
        maker = TokeniseProcess(wrong, 1, lambda note: None)
        maker.want(0)
        assert maker.process is not None
        assert maker.process.wait(60) == 1
        for _ in range(2):
            with pytest.raises(PlaitError, match=words):
                maker.check()
        maker.close()


def test_texts_of_before_are_not_tokenised_again(texts: Dataset, tmp_path: Path) -> None:
    text = Text.train(WORDS * 20, 300)
    settings = BlockSettings(BLOCK, True, 1, lambda note: None)
    first = load_blocks(texts, "train", text, tmp_path / "cache", CONTEXT, settings)
    assert first.blocks is not None
    first.blocks.wait(1)
    first.blocks.close()
    whole = [block for block in range(len(first.blocks)) if first.blocks.files.is_there(block)]
    stamps = {block: (tmp_path / f"cache/train-text-block-{block:05d}.raw").stat().st_mtime_ns for block in whole}
    again = load_blocks(texts, "train", text, tmp_path / "cache", CONTEXT, settings)
    assert again.blocks is not None
    again.blocks.wait(len(first.blocks) - 1)
    assert stamps == {b: (tmp_path / f"cache/train-text-block-{b:05d}.raw").stat().st_mtime_ns for b in whole}
    again.blocks.close()
    # Another tokenizer that is called the same would show which ids were taken over.
    grown = write_texts(tmp_path, 6_500, 10)
    last = load_blocks(grown, "train", text, tmp_path / "cache", CONTEXT, settings)
    assert last.blocks is not None
    last.blocks.wait(len(last.blocks) - 1)
    rows = grown.iterate(grown.indices("train"))
    assert all(last.texts["text"][n] == text.encode(str(row.parts["text"])) for n, row in enumerate(rows))
    last.blocks.close()


class Disturb(Callback):
    """Kills the process that tokenises at a step, and ends the run at another."""

    def __init__(self, kill: int, end: int | None) -> None:
        self.kill, self.end = kill, end

    def on_step(self, event: StepEvent) -> None:
        if event.step == self.kill:
            for child in psutil.Process().children():
                if "tokenising" in " ".join(child.cmdline()):
                    child.kill()
        if event.step == self.end:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_whose_tokenising_is_killed_is_the_same(tmp_path: Path) -> None:
    dataset = write_texts(tmp_path, 60_000, 20)  # some 8 MB, 8 blocks; 30 steps read three of them
    recipe = parse_recipe(RECIPE, "recipe")
    notes: list[str] = []

    def told(progress: Progress) -> None:
        notes.append(progress.note)

    train(dataset, tmp_path / "whole", recipe, told)
    assert any("blocks; training begins once the first is there" in note for note in notes)
    assert not (tmp_path / "whole/cache/train-block-00007.json").exists()
    train(dataset, tmp_path / "killed", recipe, told, callbacks=[Disturb(3, None)])
    assert any("ended with code -9; it is started again" in note for note in notes)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "stopped", recipe, told, callbacks=[Disturb(12, 13)])
    train(dataset, tmp_path / "stopped", recipe, told)
    for run in ("killed", "stopped"):
        for file in ("records.jsonl", "checkpoints/last/model.safetensors"):
            assert (tmp_path / run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (run, file)
    assert not [child for child in psutil.Process().children() if "tokenising" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_two_processes_take_the_same_records(tmp_path: Path, plait: Callable[..., int]) -> None:
    dataset = write_texts(tmp_path, 60_000, 20)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    rows = []
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        command = ("train", dataset.path, "-o", run, "--recipe", tmp_path / "recipe.yaml", "--processes", count)
        assert plait(*command) == 0
        rows.append([json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()])
    one, two = rows
    assert [row["records"] for row in one] == [row["records"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
