"""Images and audio: what is decoded, what is refused, and at what cost."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.signal import resample_poly

from plait.modalities.audio_files import decode_audio, encode_wav, resample
from plait.modalities.descriptor import Limits, MediaError
from plait.modalities.image_files import decode_image, encode_png, image_fingerprint
from plait.modalities.media import MEDIA, Checker


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def make_audio(wave: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def png_bomb(width: int, height: int) -> bytes:
    """A black grey PNG of any size in a few bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF"])
def test_every_image_format_is_read(form: str) -> None:
    image = decode_image(encoded(Image.fromarray(PIXELS), form, **({"lossless": True} if form == "WEBP" else {})))
    assert image.size == (7, 5) and image.mode == "RGB"
    if form not in ("JPEG", "GIF"):
        assert np.array_equal(np.asarray(image), PIXELS)


def test_modes_become_the_four() -> None:
    sixteen = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(decode_image(encoded(sixteen, "PNG"))).tolist() == [[0, 1, 255]]
    assert decode_image(encoded(Image.new("1", (2, 2)), "PNG")).mode == "L"
    assert decode_image(encoded(Image.new("CMYK", (2, 2)), "TIFF")).mode == "RGB"
    clear = decode_image(encoded(Image.new("P", (2, 2)), "PNG", transparency=0))
    assert clear.mode == "RGBA" and clear.getpixel((0, 0))[3] == 0
    assert decode_image(encoded(Image.new("LA", (2, 2)), "PNG")).mode == "LA"
    assert decode_image(encoded(Image.new("L", (2, 2)), "PNG", transparency=0)).mode == "LA"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = decode_image(encoded(Image.fromarray(PIXELS), "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("size", [(640, 480), (97, 203), (644, 641), (30, 20), (400, 1900)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"exif": 6}])
def test_a_look_at_a_jpeg_shows_what_decoding_it_does(size: tuple[int, int], options: dict[str, object]) -> None:
    """A look decodes a reduced image: size and fingerprint are those of the whole, and what is cut is found."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    data = encoded(image, "JPEG", quality=85, **options)
    whole = decode_image(data)
    width, height, fingerprint = MEDIA["image"].look(data, True)
    assert (width, height) == whole.size == (size[::-1] if "exif" in options else size)
    a, b = (np.frombuffer(one, np.uint8).astype(int) for one in (fingerprint, image_fingerprint(whole)))
    # Of 255. An image that is turned afterwards is cut into squares from its other end.
    assert len(a) == 704 and np.abs(a - b).mean() <= (6 if "exif" in options else 1)
    with pytest.raises(MediaError, match="damaged jpeg"):
        MEDIA["image"].look(data[: len(data) * 3 // 4], True)


def test_png_and_wav_come_back() -> None:
    assert np.array_equal(np.asarray(decode_image(encode_png(PIXELS))), PIXELS)
    wave = tone(8000)
    back, rate = decode_audio(encode_wav(wave, 8000))
    assert rate == 8000 and np.abs(back - wave).max() < 1e-4
    assert soundfile.info(io.BytesIO(encode_wav(wave, 8000))).frames == len(wave)


_AUDIO = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("RF64", "PCM_24"), ("FLAC", None),
          ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]  # fmt: skip


@pytest.mark.parametrize(("form", "subtype"), _AUDIO)
def test_every_audio_format_is_read_as_mono(form: str, subtype: str | None) -> None:
    wave = tone(16000)
    data = make_audio(np.stack([wave, wave], 1), 16000, form, subtype)
    back, rate = decode_audio(data)
    assert rate == 16000 and back.ndim == 1 and back.dtype == np.float32
    assert abs(len(back) - len(wave)) <= 2304
    assert abs(float(np.sqrt(np.mean(back**2))) - float(np.sqrt(np.mean(wave**2)))) < 0.03


def test_audio_that_lies_about_its_length_is_refused() -> None:
    wav = make_audio(tone(8000), 8000, "WAV")
    with pytest.raises(MediaError, match="cut short"):
        decode_audio(wav[: len(wav) // 2])
    flac = make_audio(np.random.default_rng(0).uniform(-1, 1, 30000), 8000, "FLAC")
    with pytest.raises(MediaError):
        decode_audio(flac[: len(flac) // 2])
    with pytest.raises(MediaError, match="no samples"):
        decode_audio(make_audio(np.zeros(0), 8000, "WAV"))
    with pytest.raises(MediaError, match="not numbers"):
        decode_audio(make_audio(np.array([0.0, np.nan, 0.0]), 8000, "WAV", "FLOAT"))
    with pytest.raises(MediaError, match=r"more than 0\.1 s"):
        decode_audio(wav, Limits(seconds=0.1))


def test_other_formats_are_refused() -> None:
    for data in (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"x", make_audio(tone(8000), 8000, "WAV")):
        with pytest.raises(MediaError, match="content is"):
            decode_image(data)
    with pytest.raises(MediaError, match="content is png"):
        decode_audio(encode_png(PIXELS))
    with pytest.raises(MediaError, match="empty"):
        decode_image(b"")


_BOMBS = """
import resource, sys
from plait.modalities.descriptor import MediaError
from plait.modalities.media import MEDIA
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        MEDIA["image" if name.endswith(("png", "gif", "webp")) else "audio"].check(open(name, "rb").read())
        print("accepted")
    except MediaError as error:
        print("refused")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bomb(14000, 14000))
    webp = bytearray(encoded(Image.new("RGBA", (16, 16)), "WEBP"))
    webp = (
        b"RIFF"
        + struct.pack("<I", 100)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + b"\xff\x3f\0" * 2
        + webp[12:]
    )
    (tmp_path / "b.webp").write_bytes(webp)
    (tmp_path / "c.flac").write_bytes(make_audio(np.zeros((48000 * 700, 1), np.int16), 48000, "FLAC"))
    frames = [Image.new("P", (2000, 2000), n) for n in range(10)]
    (tmp_path / "d.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run([sys.executable, "-c", _BOMBS, *names], capture_output=True, text=True, check=True)
    *answers, rise = done.stdout.split()
    assert answers == ["refused", "refused", "refused", "accepted"]  # of a GIF just the first frame is read
    assert int(rise) <= 256


SEEDS = [encode_png(PIXELS), encoded(Image.fromarray(PIXELS), "GIF"), encoded(Image.fromarray(PIXELS), "JPEG"),
         encoded(Image.fromarray(PIXELS), "BMP"), encoded(Image.fromarray(PIXELS), "TIFF"),
         encode_wav(tone(8000, 0.05), 8000), make_audio(tone(8000, 0.05), 8000, "FLAC")]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8), st.floats(0, 1)
)
def test_damage_is_a_media_error_or_harmless(seed: bytes, flips: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(seed)
    for place, value in flips:
        data[int(place * len(data))] = value
    data = data[: max(1, int(len(data) * max(keep, 0.3)))]
    for kind in ("image", "audio"):
        try:
            MEDIA[kind].check(bytes(data))
        except MediaError as error:
            assert 3 < len(str(error)) < 250


@pytest.mark.parametrize(("rate", "to"), [(44100, 16000), (8000, 16000), (16000, 8000), (22050, 16000), (48000, 11025)])
def test_resampling_agrees_with_scipy(rate: int, to: int) -> None:
    wave = tone(rate, 0.5, 440) + 0.3 * tone(rate, 0.5, 0.3 * min(rate, to))
    ours, theirs = resample(wave, rate, to), resample_poly(wave, to, rate, window=("kaiser", 9.0))
    assert len(ours) == len(theirs) and ours.dtype == np.float32
    truth = tone(to, 0.51, 440) + 0.3 * tone(to, 0.51, 0.3 * min(rate, to))
    inner = slice(len(ours) // 10, -len(ours) // 10)
    assert np.abs(ours - truth[: len(ours)])[inner].max() < 1e-3
    assert np.abs(ours - theirs)[inner].max() < 5e-3


def test_resampling_removes_what_the_new_rate_cannot_hold_and_takes_odd_rates() -> None:
    assert np.abs(resample(tone(16000, 0.5, 6000), 16000, 8000)[200:-200]).max() < 1e-3
    odd = resample(tone(16000), 16000, 11_027)
    assert np.abs(odd - tone(11_027, len(odd) / 11_027))[500:-500].max() < 1e-3


def test_a_decoder_that_dies_or_hangs_takes_nothing_along() -> None:
    checker = Checker(patience=20.0)
    png = encode_png(PIXELS)
    try:
        assert checker("image", png) == {"width": 7, "height": 5}
        process = checker._process()
        os.kill(process.pid, signal.SIGSTOP)
        checker.patience = 0.5
        with pytest.raises(MediaError, match="took more than"):
            checker("image", png)
        checker.patience = 20.0
        assert checker("image", png)["width"] == 7
        process = checker._process()
        os.kill(process.pid, signal.SIGSTOP)
        threading.Timer(0.1, process.kill).start()
        with pytest.raises(MediaError, match="crashed"):
            checker("image", png)
        assert checker("audio", encode_wav(tone(8000), 8000))["seconds"] == 0.5
    finally:
        checker.close()


def test_checking_processes_import_no_torch() -> None:
    code = "import sys, plait.modalities.media, plait.data.work, plait.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
