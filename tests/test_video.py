"""Video, a modality in one file: read, classified, found by moment, from files made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import plait
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.modalities.descriptor import MediaError
from plait.modalities.media import kind_of_file, sniff
from plait.modalities.video import Video, VideoSettings
from plait.modalities.video_files import RATE, VIDEO, decode_video

av = pytest.importorskip("av")
FPS, SIZE = 10, 48


def write_clip(path: Path, grounds: list[int], hertz: float = 0.0) -> bytes:
    """A clip of a second for each ground: grey of this brightness, with a bright bar that moves; and a tone."""
    frames = []
    for ground in grounds:
        for n in range(FPS):
            frame = np.full((SIZE, SIZE, 3), ground, np.uint8)
            frame[:, n * 4 : n * 4 + 6] = (255 - ground, 90, 90)
            frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=FPS)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        audio = out.add_stream("aac", rate=RATE) if hertz else None
        for frame in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
        if audio is not None:
            wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(len(grounds) * RATE) / RATE)
            block = av.AudioFrame.from_ndarray((wave[None] * 32767).astype(np.int16), format="s16", layout="mono")
            block.sample_rate = RATE
            out.mux(audio.encode(block))
            out.mux(audio.encode())
    return path.read_bytes()


def test_frames_and_sound_of_a_file(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "a.mp4", [20, 200], 1000)
    clip = decode_video(data)
    assert abs(clip.seconds - 2) < 0.15 and clip.height == SIZE and abs(len(clip.frames) / clip.fps - 2) < 0.3
    assert clip.frames[2, :, -8:].mean() < 60 < 150 < clip.frames[-2, :, :8].mean()
    spectrum = np.abs(np.fft.rfft(clip.wave[:RATE]))
    assert abs(int(spectrum.argmax()) - 1000) < 5
    again = VIDEO.unpack(VIDEO.pack(clip))
    assert (again.frames == clip.frames).all() and (again.wave == clip.wave).all()
    assert sniff(data[:64]) == ("video", "mp4") and sniff(VIDEO.preview(data, clip)[:64]) == ("image", "webp")
    assert kind_of_file(data[:64], ".m4a") == "audio"  # a container tells by its name what it holds
    for damaged in (data[: len(data) // 2], data[:40] + bytes(200)):
        with pytest.raises(MediaError):
            decode_video(damaged)


def test_a_sample_keeps_to_its_budget(tmp_path: Path) -> None:
    modality = Video(VideoSettings(tokens=20, fps=2.0), 16)
    clip = decode_video(write_clip(tmp_path / "a.mp4", [20, 90, 200, 20, 90, 200]))
    windows = modality.windows(clip)
    assert [len(window) for window in windows] == [4] * len(windows) and modality.token_count(4) == 20
    assert [round(one.start) for one in modality.moments(clip)] == [0, 1, 2, 3, 4]
    values, lengths = modality.batch([windows[0], windows[1][:2]])
    both, alone = modality.encoder(values, lengths), modality.encoder(*modality.batch([windows[1][:2]]))
    assert both.shape == (2, 20, 16)
    np.testing.assert_allclose(both[1, :10].detach(), alone[0].detach(), atol=1e-5)


def test_clips_are_learnt_and_found_by_moment(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n in range(24):
        label, ground = ("dark", rng.integers(0, 50)) if n % 2 else ("light", rng.integers(190, 250))
        write_clip(tmp_path / "in" / label / f"{n}.mp4", [int(ground)])
    (tmp_path / "in" / "dark" / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    dataset = Dataset.open(tmp_path / "out") if prepare(tmp_path / "in", tmp_path / "out", workers=0) else None
    assert dataset is not None and dataset.columns == {"video": "video", "label": "text"} and len(dataset) == 24
    assert "damaged mp4" in dataset.rejects[0].reason
    recipe = {
        "model": {"backbone": {"width": 32, "layers": 1, "heads": 2, "context": 160}, "text": {"vocabulary": 256}},
        "training": {"steps": 12, "recogniser_steps": 30, "batch_size": 8, "precision": "fp32", "compile": "off"},
    }
    run = plait.train(dataset, tmp_path / "run", recipe=recipe)
    model = plait.load(tmp_path / "run")
    wave = write_clip(tmp_path / "new" / "x.mp4", [30])
    assert model.classify(tmp_path / "new" / "x.mp4")[0].label == "dark"
    assert model.classify(wave)[0].label == "dark" and "describe" in model.verbs and run is not None
    write_clip(tmp_path / "longer" / "y.mp4", [30, 30, 30, 220, 220, 220])
    index = plait.Index(tmp_path / "index", tmp_path / "run")
    assert index.add([tmp_path / "longer"]).new == 5
    assert index.add([tmp_path / "longer"]).same == 1
    hits = index.search(write_clip(tmp_path / "light.mp4", [220]) and tmp_path / "light.mp4", 3)
    assert len(hits) == 1 and hits[0].start is not None and hits[0].start >= 2.0
