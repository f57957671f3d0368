"""Features: what they add is there, and fits the extension points that lower layers declare."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plait
from plait.core.device import choose_device, matmul_precision
from plait.core.features import ExtensionPoint, features


def test_every_extension_is_asked_for_and_there() -> None:
    """A name that no layer declares would be ignored in silence."""
    for module in pkgutil.walk_packages(plait.__path__, "plait."):
        if ".__main__" not in module.name and "studio" not in module.name:
            importlib.import_module(module.name)
    assert len(features()) > 5
    for feature in features():
        for point, entry in feature.adds.items():
            assert point in ExtensionPoint.declared, f"{feature.name} adds '{point}', which nothing asks for"
            assert feature.name in ExtensionPoint.declared[point].by_feature(), entry


def test_every_extension_point_is_documented() -> None:
    for module in pkgutil.walk_packages(plait.__path__, "plait."):
        if ".__main__" not in module.name and "studio" not in module.name:
            importlib.import_module(module.name)
    page = (Path(__file__).parents[1] / "docs" / "explanation" / "architecture.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert set(ExtensionPoint.declared) <= listed


def test_a_feature_can_be_deleted(tmp_path: Path) -> None:
    """Without the folder of a feature all else works; here: help, and a model in use."""
    package = tmp_path / "plait"
    source = Path(plait.__file__).parent
    package.mkdir()
    for path in source.iterdir():
        if path.name not in ("recommend", "__pycache__"):
            (package / path.name).symlink_to(path)
    code = (
        "import sys; sys.argv = ['plait', '--help']; import plait, plait.cli; from plait.core.features import features;"
        "assert 'recommend' not in [one.name for one in features()];"
        "import plait.inference.model, plait.training.trainer, plait.data.prepare, plait.evaluation.tasks;"
        "plait.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "recommend" not in done.stdout and "generate" in done.stdout


@pytest.mark.parametrize("outside", ["highest", "high"])
def test_the_precision_of_products_is_lent(outside: str) -> None:
    torch.set_float32_matmul_precision(outside)
    try:
        device = choose_device("cpu")
        assert torch.get_float32_matmul_precision() == outside
        first, second = matmul_precision(device), matmul_precision(device)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as threads may
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == outside
    finally:
        torch.set_float32_matmul_precision("highest")
