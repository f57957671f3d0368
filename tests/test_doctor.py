"""The doctor names what is wrong, and with what to go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.core.errors import PlaitError
from plait.doctor import check_folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_doctor(
    trained: Path, world: Path, tmp_path: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = plait("doctor", *arguments)
        return code, capsys.readouterr().out

    code, text = told(trained)
    assert code == 0, text
    for subject in ("python", "packages", "processor", "threads", "gpu", "disk", "espeak", "checkpoint", "codec"):
        assert f"  {subject}" in text, subject
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    best = (run / "checkpoints" / "best").resolve()
    flip(best / "model.safetensors")
    code, text = told(run)
    assert code == 1
    assert f"{best / 'model.safetensors'} was altered or cut" in text and "used: the best checkpoint is damaged" in text
    # The folders alone; the installation was checked twice.
    data = tmp_path / "data"
    shutil.copytree(world.parent / "data", data)
    assert {found.level for found in check_folder(data)} <= {"ok", "warn"}
    first, second, *_ = sorted(data.glob("*.parquet"))
    flip(first)
    second.unlink()
    text = " ".join(found.text for found in check_folder(data) if found.level == "fail")
    assert f"{first} was altered" in text and f"{second} is missing" in text
    with pytest.raises(PlaitError, match="no run"):
        check_folder(tmp_path)
