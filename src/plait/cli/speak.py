"""The command that speaks texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, SeedOption, app, out, write


@app.command()
def speak(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="What to say.")],
    guidance: Annotated[float | None, typer.Option(help="How strongly the text rules; 1 is not at all more.")] = None,
    seed: SeedOption = 0,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="A WAV file.")] = Path("speech.wav"),
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Say a text.

    Example: plait speak runs/demo "seven" -o seven.wav
    """
    from plait.modalities.audio_files import encode_wav

    wave, rate = plait.load(model, device, precision).speak(text, n=1, guidance=guidance, seed=seed)[0]
    write(out_file, encode_wav(wave, rate))
    out.print(f"{len(wave) / rate:.2f} s of audio: {out_file}")
