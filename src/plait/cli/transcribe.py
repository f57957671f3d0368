"""The command that transcribes audio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, existing, note_windows, out, plain


@app.command()
def transcribe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Recordings.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    language: Annotated[str | None, typer.Option(help="Spoken there, as en; default: found out.")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate into English.")] = "transcribe",
    times: Annotated[bool, typer.Option("--times", help="A line a segment, with when it was said.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Write down what is said in a recording.

    Example: plait transcribe openai/whisper-tiny speech.wav
    """
    loaded = plait.load(model, device, precision)
    for file in files:
        note_windows(loaded, existing(file))
        if times:
            for segment in loaded.segments(existing(file), language=language, task=task):
                out.print(plain(f"{file}: {segment.start:7.2f} {segment.end:7.2f} {segment.text}"))
            continue
        out.print(plain(f"{file}: {loaded.transcribe(existing(file), column=column, language=language, task=task)}"))
