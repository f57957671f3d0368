"""The command that transcribes audio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.cli.table_options import InputOption, OutOption, OverwriteOption, WorkersOption, write_table
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, existing, note_windows, out, plain


@app.command()
def transcribe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Recordings, or with -o folders of them.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    language: Annotated[str | None, typer.Option(help="Spoken there, as en; default: found out.")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate into English.")] = "transcribe",
    times: Annotated[bool, typer.Option("--times", help="A line a segment, with when it was said.")] = False,
    words: Annotated[bool, typer.Option("--words", help="A line a word, with when it was said.")] = False,
    table: OutOption = None,
    inputs: InputOption = None,
    srt: Annotated[bool, typer.Option("--srt", help="With -o: subtitles beside each recording, too.")] = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Write down what is said in a recording; in a whole folder with -o.

    Example: plait transcribe openai/whisper-tiny speech.wav
    """
    loaded = plait.load(model, device, precision)
    if table is not None:
        from plait.library.tables import TableQuery

        query = TableQuery("transcribe", column, language=language, task=task, sidecar="srt" if srt else None)
        write_table(loaded, [str(file) for file in files], table, query, inputs, overwrite, workers)
        return
    for file in files:
        note_windows(loaded, existing(file))
        if times or words:
            segments = loaded.segments(existing(file), language=language, task=task, words=words)
            for one in (word for segment in segments for word in (segment.words if words else (segment,))):
                out.print(plain(f"{file}: {one.start:7.2f} {one.end:7.2f} {one.text}"))
            continue
        out.print(plain(f"{file}: {loaded.transcribe(existing(file), column=column, language=language, task=task)}"))
