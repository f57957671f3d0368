"""PLAIT_ISA caps everything that computes, or says why it cannot; and the faster way of computing is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.core import isa
from plait.core.errors import PlaitError
from plait.kernels.choice import Choice, Question, choose

x86 = pytest.mark.skipif("avx2" not in [level.name for level in isa.supported()], reason="no AVX2 here")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in dict(isa.by_name("avx2").libraries)}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=False
    )


@x86
def test_a_cap_reaches_everything() -> None:
    code = (
        "import plait, torch\n"
        "from plait.core.device import choose_device\n"
        "from plait.kernels import build, generation\n"
        "print(torch.backends.cpu.get_cpu_capability(), choose_device('cpu', training=True).dtype,\n"
        "      build.kernel('generation').level.name, generation.library().plait_products())\n"
    )
    done = python(code, PLAIT_ISA="avx2", PLAIT_NATIVE="1")
    assert done.stdout.split() == ["AVX2", "torch.float32", "avx2", "0"], done.stderr


@x86
def test_a_cap_that_comes_too_late_is_refused() -> None:
    code = "import torch\nfrom plait.core.device import choose_device\nchoose_device('cpu')"
    done = python(code, PLAIT_ISA="avx2")
    assert done.returncode and "came too late" in done.stderr


@pytest.mark.parametrize(("name", "words"), [("sse9", "not known"), ("neon", "this processor has"), ("AVX2", "")])
def test_names(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "supported", lambda: isa.LEVELS[1:2])
    monkeypatch.setenv("PLAIT_ISA", name)
    for variable, value in isa.LEVELS[1].libraries:
        monkeypatch.setenv(variable, value)
    if words:
        with pytest.raises(PlaitError, match=words):
            isa.level()
    else:
        assert isa.level() is isa.LEVELS[1]


def test_the_faster_way_is_taken_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = Question("a sum", "kernel-1", "avx2", 1, "a processor", "2.0")
    calls = 0

    def slow() -> None:
        sum(range(20000))

    def ways() -> dict:
        nonlocal calls
        calls += 1
        return {"1": {"kernel": slow, "PyTorch": lambda: None}, "8": {"kernel": lambda: None, "PyTorch": slow}}

    for _ in range(2):
        choice = choose(asked, ways)
        assert (choice.way("1"), choice.way("8")) == ("PyTorch", "kernel")
    assert calls == 1
    (file,) = (tmp_path / "plait" / "choices").glob("*.json")
    for text in ("{", "[]", json.dumps({"what": "", "seconds": {"1": {}}})):
        file.write_text(text)  # what cannot be read is measured again
        assert isinstance(choose(asked, ways), Choice)
    assert calls == 4


LOWER = [level.name for level in isa.supported()[:-1]]  # the best one is what all other tests use


@pytest.mark.parametrize("level", LOWER)
def test_products_at_a_cap(level: str) -> None:
    """Packed layers and a product of training with the instructions of lesser processors."""
    code = (
        "import plait, torch\n"
        "from plait.kernels import build, training\n"
        "from plait.kernels.linear import PackedLinear\nfrom plait.kernels.quantisation import STORAGES\n"
        "torch.manual_seed(0)\n"
        "x, weight = torch.randn(13, 96), torch.randn(70, 96)\n"
        "for storage in STORAGES:\n"
        "    layer = PackedLinear(weight, None, storage)\n"
        "    wanted = (x.double() @ layer.dense().double().t())\n"
        "    assert (layer(x) - wanted).norm() < 0.01 * wanted.norm(), storage\n"
        "training.library()\n"
        "assert (training._product(x, weight.t()) - x.double() @ weight.double().t()).abs().max() < 1e-4\n"
        "print(build.kernel('generation').level.name, build.kernel('training').level.name)\n"
    )
    done = python(code, PLAIT_ISA=level, PLAIT_NATIVE="1")
    assert done.stdout.split() == [level, level], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("level", LOWER)
def test_all_kernels_at_a_cap(level: str) -> None:
    tests = Path(__file__).with_name("test_native.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "PLAIT_ISA": level}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
