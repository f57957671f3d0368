"""The command that checks an installation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from plait.console import app, out, plain


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A run, a checkpoint or a dataset to check too.")] = None,
) -> None:
    """Check the installation, and the integrity of a run or a dataset; exit code 1 where something fails.

    Example: plait doctor runs/photos
    """
    from plait.doctor import check_folder, check_installation

    findings = check_installation(folder or Path()) + (check_folder(folder) if folder else [])
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        mark = f"[{colours[finding.level]}]{finding.level:4}[/{colours[finding.level]}]"
        out.print(f"{mark}  {plain(finding.subject)}: {plain(finding.text)}")
    if any(finding.level == "fail" for finding in findings):
        sys.exit(1)
