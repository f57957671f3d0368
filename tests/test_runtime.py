"""Files are published whole, folders have one writer, and random numbers are a function of their keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.core.device import choose_device
from plait.core.errors import PlaitError
from plait.core.files import only_writer, publish_folder
from plait.core.rng import uniform


def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publish_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="stop"), publish_folder(target) as folder:
        (folder / "a").write_text("2")
        raise ValueError("stop")
    assert (target / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old folder is found again, the unfinished one is cleared away."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.{dead.pid}.old").mkdir()
    (tmp_path / f".out.{dead.pid}.old" / "a").write_text("1")
    (tmp_path / f".out.{dead.pid}.tmp").mkdir()
    with pytest.raises(ValueError, match="stop"), publish_folder(tmp_path / "out"):
        raise ValueError("stop")
    assert (tmp_path / "out" / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_second_writer_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from plait.core.files import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout and first.stdout.readline() == "in\n"
    with pytest.raises(PlaitError, match=str(first.pid)), only_writer(tmp_path):
        pass
    first.communicate("")
    with only_writer(tmp_path):
        pass


def test_uniform_depends_on_its_keys_alone() -> None:
    ids = np.arange(1000)
    alone = np.array([float(uniform(3, 1, i)) for i in ids[:50]])
    assert np.array_equal(uniform(3, 1, ids)[:50], alone)
    assert not np.array_equal(uniform(3, 2, ids), uniform(3, 1, ids))
    draws = uniform(0, np.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005 and abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01


def test_fp32_products_are_those_of_fp32() -> None:
    """Some processors round them to bf16 where torch is told that less precision will do."""
    choose_device("cpu", "fp32")
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    wanted = a.double() @ b.double()
    assert ((a @ b).double() - wanted).abs().max() < 1e-5 * wanted.abs().max()
