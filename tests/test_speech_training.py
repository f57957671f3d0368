"""Whisper trained on clips of one's own, with a tiny random model; what is exported is transformers' to load."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import plait as library
from plait.core.files import read_json
from plait.core.signals import Signals
from test_pretrained import folders  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]
RATE = 16_000


def tone(pitch: int) -> np.ndarray:
    return (0.3 * np.sin(np.arange(RATE // 2) * 0.05 * (1 + pitch))).astype(np.float32)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Tones, each with words that tell how high it is and a word of its own, and one clip that is too long."""
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "said", "split"])
        for n in range(32):
            soundfile.write(folder / f"{n}.wav", tone(n % 2), RATE)
            table.writerow([f"{n}.wav", f"{('the cat', 'a dog')[n % 2]} word{n}", "val" if n > 27 else "train"])
        soundfile.write(folder / "long.wav", np.tile(tone(0), 62), RATE)
        table.writerow(["long.wav", "the cat sat on the mat", "train"])
    return folder


def test_clips_are_learnt_and_exported(
    clips: Path, folders: dict[str, Path], tmp_path: Path, plait: Plait,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    options = ("--init-from", folders["whisper"], "--steps", 40, "--batch-size", 8, "--learning-rate", 1e-2)
    assert plait("train", clips, "-o", run, *options) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "whisper from" in told and "nats a token" in told
    assert "1 of" in told and "longer than 30 s" in told and "Next: plait evaluate" in told
    model = library.load(run)
    heard = [model.transcribe((tone(pitch), RATE)) for pitch in (0, 1)]
    assert heard[0].startswith("the cat") and heard[1].startswith("a dog"), heard
    # Measured beside the model that it began from, whose words are random.
    assert plait("evaluate", run, "--split", "val") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "of the words wrong (said from audio, 4 clips" in told and "worth it" in told, told
    wer = read_json(run / "metrics.json")["transcription/audio-said/wer"]
    assert wer["value"] < wer["baseline"] and (run / "report.html").is_file()
    assert plait("export", run, "-o", tmp_path / "out") == 0
    assert "training" not in read_json(tmp_path / "out" / "config.json")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    features = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for pitch in (0, 1):
        with torch.no_grad():
            ids = theirs.generate(**features(tone(pitch), sampling_rate=RATE, return_tensors="pt"))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == heard[pitch]
    with pytest.raises(library.PlaitError, match="the encoder alone can be frozen"):
        library.train(clips, tmp_path / "odd", init_from=str(folders["whisper"]), freeze=["backbone"], progress=False)


def test_training_goes_on_bit_for_bit(
    clips: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    options = {"init_from": str(folders["whisper"]), "steps": 8, "batch_size": 8, "learning_rate": 1e-3}
    whole = library.train(clips, tmp_path / "whole", progress=False, **options)
    check, calls = Signals.check, []

    def interrupted(self: Signals) -> None:
        calls.append(0)
        if len(calls) == 3:  # after the third step, as Ctrl-C does
            raise KeyboardInterrupt
        check(self)

    monkeypatch.setattr(Signals, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.train(clips, tmp_path / "cut", progress=False, **options)
    monkeypatch.setattr(Signals, "check", check)
    cut = library.train(clips, tmp_path / "cut", progress=False, **options)
    assert cut.finished and read_json(cut.last / "config.json")["training"]["step"] == 8
    assert (cut.last / "model.safetensors").read_bytes() == (whole.last / "model.safetensors").read_bytes()
