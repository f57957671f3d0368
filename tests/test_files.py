"""Files as people have them: what programs write that breaks others, each with the right value or the true reason."""

from __future__ import annotations

import io
import json
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image, PngImagePlugin

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.data.record import SPLITS
from plait.modalities.audio_files import decode_audio, encode_wav
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import decode_image, encode_png
from plait.modalities.inputs import media_or_text
from plait.modalities.media import MEDIA, sniff
from plait.modalities.text import Text
from plait.recommend.write_histories import read_histories
from sources import lines, put

Command = Callable[..., int]


def image(n: int) -> bytes:
    return encode_png(np.random.default_rng(n).integers(0, 256, (6, 8, 3), np.uint8))


def made(source: Path, **options: Any) -> tuple[Dataset, dict[tuple[str, int | None], str]]:
    """The dataset of a source, and the reason of each reject by file and line."""
    out = source.parent / "out"
    prepare(source, out, workers=0, **options)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return Dataset.open(out), {(r["file"], r["line"]): r["reason"] for r in rejects}


def column(dataset: Dataset, name: str) -> list[str]:
    """The texts of a column in the order of the file."""
    found = {r.id: str(r.parts[name]) for r in dataset.iterate(columns=[name]) if name in r.parts}
    return [found[id_] for id_ in sorted(found, key=lambda id_: int(id_.rpartition(":")[2]))]


def labels(dataset: Dataset) -> dict[str, tuple[str, str]]:
    return {r.id: (r.split, str(r.parts.get("label"))) for r in dataset.iterate()}


# --- tables -----------------------------------------------------------------------------------------------------


def talk(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]}


@pytest.mark.parametrize("odd", [[], "hello", [{"role": "user"}], {"role": "user"}, 7])
def test_an_odd_conversation_is_rejected_alone(tmp_path: Path, odd: object) -> None:
    dataset, rejects = made(put(tmp_path / "t.jsonl", lines(*map(talk, range(6)), {"messages": odd}, talk(7))))
    assert dataset.manifest.chats == ["messages"] and len(dataset) == 7
    assert "messages" in rejects["t.jsonl", 7] and len(rejects) == 1


def test_conversations_of_other_shapes(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]
    dataset, _ = made(put(tmp_path / "t.jsonl", lines(*[{"conversations": said, "n": n} for n in range(4)])))
    first = json.loads(column(dataset, "conversations")[0])
    assert first == [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    rows = [{"messages": json.dumps(talk(n)["messages"])} for n in range(4)]
    dataset, _ = made(put(tmp_path / "s.jsonl", lines(*rows)), replace=True)
    assert dataset.manifest.chats == ["messages"]
    assert json.loads(column(dataset, "messages")[2]) == talk(2)["messages"]


def test_most_values_decide_what_a_column_is(tmp_path: Path) -> None:
    for n in range(9):
        put(tmp_path / "in" / f"{n}.png", image(n))
    table = [{"photo": f"{n}.png"} for n in range(9)]
    put(tmp_path / "in/t.jsonl", lines(*table, {"photo": "https://example.org/9.png"}))
    dataset, rejects = made(tmp_path / "in")
    assert dataset.columns == {"photo": "image"} and len(dataset) == 9
    assert "does not exist" in rejects["t.jsonl", 10]


@pytest.mark.parametrize(
    ("text", "names", "wanted", "bad"),
    [
        # A stray quote, one that is never closed, and one that closes in another record.
        ('a,b\n"x" y,1\nz,2\n', ["a", "b"], [["z", "2"]], [2]),
        ('a,b\nw,0\n"x,1\ny,2\nz,3\n', ["a", "b"], [["w", "0"], ["y", "2"], ["z", "3"]], [3]),
        ('a,b\n"x,1\ny,2\n"u, v",3\n', ["a", "b"], [["y", "2"], ["u, v", "3"]], [2]),
        ('a,b\n"two\nlines",1\nz,2,3\nq,4\n', ["a", "b"], [["two\nlines", "1"], ["q", "4"]], [4]),
        # The mark between cells.
        ('a,"b (1;2;3)"\nx,1\ny,2\n', ["a", "b (1;2;3)"], [["x", "1"], ["y", "2"]], []),
        ('"which; one, or | two?";b\nx;1\ny;2\n', ["which; one, or | two?", "b"], [["x", "1"], ["y", "2"]], []),
        ("a|b\nx, y|1\nz|2\n", ["a", "b"], [["x, y", "1"], ["z", "2"]], []),
        ('a, b\nx, "1, 2"\ny, 3\n', ["a", "b"], [["x", "1, 2"], ["y", "3"]], []),
        ("a\nfirst, second\nthird, fourth, fifth\nsixth\n", ["a"],
         [["first, second"], ["third, fourth, fifth"], ["sixth"]], []),
        # Names that are there twice.
        ("a,b,a\nx,1,y\nz,2,w\n", ["a", "b", "a_2"], [["x", "1", "y"], ["z", "2", "w"]], []),
        ("a,a_2,a\nx,1,y\n", ["a", "a_2", "a_3"], [["x", "1", "y"]], []),
    ],
)  # fmt: skip
def test_csv(tmp_path: Path, text: str, names: list[str], wanted: list[list[str]], bad: list[int]) -> None:
    dataset, rejects = made(put(tmp_path / "t.csv", text))
    assert sorted(dataset.columns) == sorted(names)
    assert [list(row) for row in zip(*(column(dataset, name) for name in names), strict=True)] == wanted
    assert [line for _, line in rejects] == bad
    assert any("two columns" in note for note in dataset.manifest.warnings) == any("_" in name for name in names)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_bytes_that_are_not_utf8_cost_their_row(tmp_path: Path, name: str) -> None:
    rows = [f"line {n}" for n in range(3000)]
    text = "text\n" + "\n".join(rows) if name == "t.csv" else lines(*({"text": row} for row in rows))
    data = text.encode().replace(b"line 1500", b"l\xeene 1500")
    dataset, rejects = made(put(tmp_path / name, data), near_duplicates=False)
    at = 1502 if name == "t.csv" else 1501
    assert len(dataset) == 2999 and list(rejects) == [(name, at)] and "0xee" in rejects[name, at]
    assert any("not UTF-8" in warning for warning in dataset.manifest.warnings)


def test_the_form_is_told_by_the_content(tmp_path: Path) -> None:
    rows = [{"text": f"line {n}", "n": n} for n in range(5)]
    forms: dict[str, bytes] = {
        "a.json": lines(*rows).encode(),
        "b.json": json.dumps({"version": 1, "data": rows}, indent=1).encode(),
        "c.jsonl": json.dumps(rows, indent=2).encode(),
        "d.csv": b"text\tn\n" + b"".join(f"line {n}\t{n}\n".encode() for n in range(5)),
        "e.csv": ("text\tn\n" + "".join(f"line {n}\t{n}\n" for n in range(5))).encode("utf-16"),
        "f.csv": zlib.compress(b"text,n\n" + b"".join(f"line {n},{n}\n".encode() for n in range(5)), wbits=31),
    }
    for name, data in forms.items():
        dataset, rejects = made(put(tmp_path / name[0] / name, data))
        assert column(dataset, "text") == [row["text"] for row in rows] and not rejects, name
    put(tmp_path / "g/g.json", json.dumps({"text": ["x", "y"], "n": [1, 2]}))
    with pytest.raises(PlaitError, match="object of columns"):
        made(tmp_path / "g")
    dataset, rejects = made(put(tmp_path / "h/h.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n{"text": "d"}\n'))
    assert column(dataset, "text") == ["a", "d"] and "twice" in rejects["h.jsonl", 2]


def test_values_of_parquet(tmp_path: Path) -> None:
    late = pa.array([400_000_000_000_000_000] * 3, pa.timestamp("us"))
    fine = pa.array([1_700_000_000_000_000_001] * 3, pa.timestamp("ns"))
    binary = pa.array([f"wörd {n}".encode() for n in range(3)], pa.binary())
    mapped = pa.array([[("k", n), ("l", 2)] for n in range(3)], pa.map_(pa.string(), pa.int64()))
    table = pa.Table.from_arrays(
        [late, fine, binary, mapped, pa.array([1.5, float("nan"), None]), binary], ["late", "fine", "b", "m", "x", "b"]
    )
    pq.write_table(table, tmp_path / "t.parquet")
    dataset, rejects = made(tmp_path / "t.parquet")
    assert not rejects and len(dataset) == 3
    assert column(dataset, "late")[0].startswith("14645") and column(dataset, "fine")[0].endswith("000000001")
    assert column(dataset, "b") == column(dataset, "b_2") == [f"wörd {n}" for n in range(3)]
    assert column(dataset, "m")[1] == '{"k": 1, "l": 2}' and column(dataset, "x") == ["1.5"]


def test_a_file_name_that_only_begins_like_a_split(tmp_path: Path) -> None:
    rows = lines(*({"text": f"text {n}"} for n in range(40)))
    dataset, _ = made(put(tmp_path / "test_prompts.jsonl", rows))
    assert dataset.manifest.counts["train"] > 20 and "test_prompts" in " ".join(dataset.manifest.warnings)
    put(tmp_path / "in/train_prompts.jsonl", rows)
    put(tmp_path / "in/test_prompts.jsonl", lines({"text": "held out"}))
    dataset, _ = made(tmp_path / "in", replace=True)
    assert dataset.manifest.counts["test"] == 1


# --- folders and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "wanted", "told"),
    [
        (["apple", "dev", "pear"], {"apple": (None, "apple"), "dev": (None, "dev")}, True),
        (["train/test", "train/dog", "test/test", "test/dog"],
         {"train/test": ("train", "test"), "test/dog": ("test", "dog")}, False),
        (["a/train", "a/test", "b/train", "b/test"], {"a/train": ("train", "a"), "b/test": ("test", "b")}, False),
        (["train/x", "train/y", "test/x", "notes"], {"train/x": ("train", "x"), "notes": ("train", "notes")}, True),
        (["eval"], {"eval": ("test", "None")}, False),
    ],
)  # fmt: skip
def test_split_words_among_folders(
    tmp_path: Path, paths: list[str], wanted: dict[str, tuple[str | None, str]], told: bool
) -> None:
    for place, path in enumerate(paths):
        for n in range(4):
            put(tmp_path / "in" / path / f"{n}.png", image(10 * place + n))
    dataset, _ = made(tmp_path / "in")
    found = labels(dataset)
    for path, (split, label) in wanted.items():
        mine = [found[f"{path}/{n}.png"] for n in range(4)]
        assert {label for _, label in mine} == {label}
        assert split is None or all(of == split or (split == "train" and of == "val") for of, _ in mine)
    assert any("beside" in warning for warning in dataset.manifest.warnings) == told


def test_names_in_either_normal_form_are_one(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "über")
    for n in range(3):
        put(tmp_path / "in" / f"{nfd}{n}.png", image(n))
    put(tmp_path / "in/metadata.csv", "file_name,label\n" + "".join(f"über{n}.png,{nfd}\n" for n in range(3)))
    dataset, rejects = made(tmp_path / "in")
    assert not rejects and set(column(dataset, "label")) == {"über"}
    for n, form in enumerate((nfd, "über", "wolf")):
        put(tmp_path / "two" / form / f"{n}.png", image(n))
    dataset, _ = made(tmp_path / "two", replace=True)
    assert {label for _, label in labels(dataset).values()} == {"über", "wolf"}


def test_names_of_zips(tmp_path: Path) -> None:
    """As macOS writes them, UTF-8 without the flag; in GBK, which cannot be told; and a zip that is called a tar."""
    for name, raw in (("mac", "żółw".encode()), ("gbk", "小猫咪".encode("gbk"))):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            for n in range(2):
                file.writestr(f"{'Q' * len(raw)}/{n}.png", image(n))
                file.writestr(f"owl/{n}.png", image(n + 9))
        put(tmp_path / f"{name}.{'tar' if name == 'mac' else 'zip'}", out.getvalue().replace(b"Q" * len(raw), raw))
    dataset, _ = made(tmp_path / "mac.tar")
    assert {label for _, label in labels(dataset).values()} == {"żółw", "owl"} and not any(
        "names" in warning for warning in dataset.manifest.warnings
    )
    dataset, _ = made(tmp_path / "gbk.zip", replace=True)
    assert any("not UTF-8" in warning and "437" in warning for warning in dataset.manifest.warnings)


def test_why_nothing_can_be_read(tmp_path: Path) -> None:
    put(tmp_path / "away/1.png", image(1))
    (tmp_path / "links").mkdir()
    (tmp_path / "links/1.png").symlink_to(tmp_path / "away/1.png")
    with pytest.raises(PlaitError, match=r"links holds nothing.*leads out of the source \(1\)"):
        made(tmp_path / "links")
    with pytest.raises(PlaitError, match=r"cut\.zip holds nothing.*amaged archive"):
        made(put(tmp_path / "cut.zip", b"PK\3\4" + bytes(40)))
    with pytest.raises(PlaitError, match=r"empty \(1\)"):
        made(put(tmp_path / "none/a.txt", b"").parent)
    with pytest.raises(PlaitError, match="not valid JSON"):
        made(put(tmp_path / "j/a.json", b'[{"text": "a"}, ').parent)


# --- interactions -------------------------------------------------------------------------------------------------

NEWEST_FIRST = [(u, 100 + i, 1_700_000_000 + (5 - i) * 60) for u in range(1, 4) for i in range(5)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.inter", "user_id:token\titem_id:token\ttimestamp:float\n"
         + "".join(f"{u}\t{i}\t{t}\n" for u, i, t in NEWEST_FIRST)),
        ("log.dat", "item_id::user_id::ts\n" + "".join(f"{i}::{u}::{t}\n" for u, i, t in NEWEST_FIRST)),
        ("log.txt", "who what when\n" + "".join(f"{u} {i} {t}\n" for u, i, t in NEWEST_FIRST)),
        # YooChoose: session, time, item, category; and one line that is cut.
        ("clicks.dat", "".join(f"{u},2024-04-07T10:{59 - i:02}:29.277Z,{100 + i},0\n" for u, i in
                               ((u, i) for u in range(1, 4) for i in range(5))) + "9,2024\n"),
        ("log.data", "".join(f"{u}\t{i}\t{1_700_000_000 + t % 1000 / 1000}\n" for u, i, t in NEWEST_FIRST)),
    ],
)  # fmt: skip
def test_lines_of_interactions(tmp_path: Path, name: str, text: str) -> None:
    from plait.core.config import DataRecipe

    dataset, rejects = made(put(tmp_path / "in" / name, text).parent, recipe=DataRecipe.model_validate({"items": {}}))
    catalogue = pq.read_table(tmp_path / "out/items.parquet")["id"].to_pylist()
    histories = read_histories(dataset)
    for start, stop in zip(histories.starts, histories.starts[1:], strict=False):
        assert [catalogue[i] for i in histories.items[start:stop]] == ["104", "103", "102", "101", "100"]
    assert len(histories.users) == 3 and len(rejects) == (1 if name in ("log.txt", "clicks.dat") else 0)


# --- images and audio ---------------------------------------------------------------------------------------------


def spoken(seconds: float = 3.0, rate: int = 22050) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(1).normal(0, 0.2, len(t)) * (t < seconds / 3)
    return (noise + 0.1 * np.sin(2 * np.pi * 330 * t) * (t > seconds / 2)).astype(np.float32)


def mp3(wave: np.ndarray, rate: int = 22050) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="MP3", bitrate_mode="VARIABLE", compression_level=0.4)
    return out.getvalue()


@pytest.mark.parametrize("wave", [spoken(), spoken()[::-1]], ids=["loud first", "quiet first"])
def test_an_mp3_of_varying_rates_without_a_count_is_read_whole(wave: np.ndarray) -> None:
    data = mp3(wave)
    second = data.index(b"\xff\xf3", 4)  # behind the frame that holds the count
    assert b"Xing" in data[:second] or b"Info" in data[:second]
    decoded, rate = decode_audio(data[second:])
    assert rate == 22050 and abs(len(decoded) - len(wave)) < 4 * 1152
    with_tags = b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + data[second:] + b"TAG" + bytes(125)
    assert len(decode_audio(with_tags)[0]) == len(decoded)
    assert abs(len(decode_audio(data + mp3(wave))[0]) - 2 * len(wave)) < 10 * 1152  # two files that were joined
    with pytest.raises(MediaError, match="cut short"):
        decode_audio(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("outer", "size"),
    [(0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 0x7FFFFFFF - 44), (0, 0), (36, 0), (0xFFFFFFFF, 0xFFFFF000)],
)
def test_a_wav_whose_length_was_not_known_when_it_was_written(outer: int, size: int) -> None:
    wave = spoken(0.5)
    good = encode_wav(wave, 22050)
    data = good[:4] + struct.pack("<I", outer) + good[8:40] + struct.pack("<I", size) + good[44:]
    assert np.array_equal(decode_audio(data + b"\0")[0], decode_audio(good)[0])
    with pytest.raises(MediaError, match="cut short"):
        decode_audio(good[: len(good) // 2])
    with pytest.raises(MediaError, match="no samples"):
        empty = encode_wav(np.zeros(0), 22050)
        decode_audio(empty[:4] + struct.pack("<I", 48) + empty[8:] + b"LIST" + struct.pack("<I", 4) + b"INFO")


def test_metadata_do_not_spoil_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    shown = Image.fromarray(pixels)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "word " * 300_000, zip=True)
    for options in ({"pnginfo": info}, {"icc_profile": bytes(1_400_000)}):
        out = io.BytesIO()
        shown.save(out, "PNG", **options)
        assert np.array_equal(np.asarray(decode_image(out.getvalue())), pixels)
    out = io.BytesIO()
    shown.save(out, "WEBP", lossless=True)
    body = bytearray(out.getvalue())
    damaged = body + b"XMP " + struct.pack("<I", 1 << 20) + b"<x"
    damaged[4:8] = struct.pack("<I", len(damaged) - 8)
    assert np.array_equal(np.asarray(decode_image(bytes(damaged))), pixels)


def test_grey_of_more_than_eight_bits() -> None:
    """32-bit TIFFs do not say what white is: values to 255 are taken for eight bits, others for sixteen."""
    for values, wanted in (([[0, 100, 255]], [[0, 100, 255]]), ([[0, 25700, 65535]], [[0, 100, 255]])):
        out = io.BytesIO()
        Image.fromarray(np.array(values, np.int32)).save(out, "TIFF")
        assert np.asarray(decode_image(out.getvalue())).tolist() == wanted
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 257, 514]], np.uint16)).save(out, "PNG")
    assert np.asarray(decode_image(out.getvalue())).tolist() == [[0, 1, 2]]


# --- commands -----------------------------------------------------------------------------------------------------


def test_what_an_argument_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jfif", "b.wave", "c.heic", "no ending", "d.unknown"):
        put(tmp_path / name, b"x")
        assert media_or_text(name) == Path(name)
    for suffix in sorted(s for files in MEDIA.values() for s in files.suffixes):
        with pytest.raises(PlaitError, match="does not exist"):
            media_or_text(f"note{suffix}")
    for gone in ("./x.y", "../clips/a.dat", "~/photo.raw", "/tmp/none/a.bin"):
        with pytest.raises(PlaitError, match="does not exist"):
            media_or_text(gone)
    for text in ("hello", "is it a .png", "either/or", "e.g. this", "A. Nobody", "what?\n", "x" * 5000, "a\0b"):
        assert media_or_text(text) == text


def test_other_data_into_a_runs_folder(tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for name, label in (("a", "x"), ("a", "y"), ("b", "u"), ("b", "w")):
        for n in range(12):
            put(tmp_path / name / label / f"{n}.txt", f"{label} {n} text {n * 7}")
    recipe = put(tmp_path / "r.yaml", "model: {backbone: {width: 16, layers: 1, heads: 2, context: 32}}\n")
    begin = ("train", "-o", tmp_path / "run", "--recipe", recipe, "--steps")
    assert plait(*begin, 2, tmp_path / "a") == 0
    assert plait(*begin, 2, tmp_path / "b") == 1 and "was made from" in capsys.readouterr().err
    put(tmp_path / "a/x/new.txt", "x another text")
    assert plait(*begin, 2, tmp_path / "a") == 1 and "added, removed or changed" in capsys.readouterr().err
    assert plait(*begin, 4, tmp_path / "b", "--allow-changes") == 0
    labels_now = {str(record.parts["label"]) for record in Dataset.open(tmp_path / "run/data").iterate()}
    assert labels_now == {"u", "w"}


def test_a_run_knows_its_data_wherever_it_stands(
    tmp_path: Path, plait: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in ("x", "y"):
        for n in range(12):
            put(tmp_path / "a" / label / f"{n}.txt", f"{label} {n} text {n * 7}")
    recipe = put(tmp_path / "r.yaml", "model: {backbone: {width: 16, layers: 1, heads: 2, context: 32}}\n")
    monkeypatch.chdir(tmp_path)
    assert plait("train", "a", "-o", "run", "--recipe", recipe, "--steps", 2) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["dataset"] == "data"
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "a")
    assert plait("evaluate", "../moved", "--limit", 2) == 0
    assert plait("prepare", tmp_path / "a", "-o", tmp_path / "data") == 0
    monkeypatch.chdir(tmp_path)
    assert plait("train", "data", "-o", "run", "--recipe", recipe, "--steps", 2) == 0
    monkeypatch.chdir(tmp_path / "a")
    assert plait("evaluate", tmp_path / "run", "--limit", 2) == 0


def test_home_and_other_encodings(tmp_path: Path, plait: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(put(tmp_path / "elsewhere/x", "").parent)
    for n in range(3):
        put(tmp_path / "photos/é" / f"{n}.png", image(n))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert plait("prepare", "~/photos", "--out=~/data", "--workers", 0) == 0
    assert Dataset.open(tmp_path / "data").manifest.counts["train"] and list(Path.cwd().iterdir()) == [Path.cwd() / "x"]
    assert stream.errors == "backslashreplace"


def test_an_import_reads_by_its_own_rules() -> None:
    decomposed = unicodedata.normalize("NFD", "Việt Å")
    own = Text.train(["Việt Nam Å"] * 9, 300)
    assert own.encode(decomposed) == own.encode("Việt Å")
    own.tokenizer.normalizer = None  # type: ignore[assignment]
    assert Text(own.tokenizer).encode(decomposed) == own.tokenizer.encode(decomposed).ids != own.encode("Việt Å")


def test_every_ending_has_one_kind_and_every_format_a_sniffer() -> None:
    endings = [suffix for files in MEDIA.values() for suffix in files.suffixes]
    assert len(endings) == len(set(endings)) and all(e.startswith(".") and e == e.lower() for e in endings)
    assert sniff(image(0)[:64]) == ("image", "png") and sniff(b"plain text, nothing else") is None
    assert SPLITS == ("train", "val", "test")


# --- what phones make ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), [("HEIF", "heic"), ("AVIF", "avif"), ("JXL", "jxl")])
def test_images_of_phones(name: str, form: str) -> None:
    pytest.importorskip("pillow_jxl")
    pytest.importorskip("pillow_heif").register_heif_opener()
    row = np.arange(64, dtype=np.uint8) * 4
    pixels = np.stack([np.tile(row, (48, 1)), np.tile(row[::-1], (48, 1)), np.full((48, 64), 90, np.uint8)], 2)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, quality=95)
    assert sniff(out.getvalue()[:64]) == ("image", form)
    decoded = decode_image(out.getvalue())
    assert decoded.size == (64, 48) and np.abs(np.asarray(decoded).astype(int) - pixels).mean() < 3
    with pytest.raises(MediaError):
        decode_image(out.getvalue()[:100])
    assert MEDIA["image"].preview(out.getvalue(), decoded)  # as a browser shows it


@pytest.mark.parametrize(
    ("container", "codec", "rate", "form"),
    [("ipod", "aac", 16000, "m4a"), ("adts", "aac", 16000, "aac"), ("webm", "libopus", 48000, "webm"),
     ("3gp", "aac", 16000, "m4a")],
)  # fmt: skip
def test_audio_of_phones(container: str, codec: str, rate: int, form: str) -> None:
    av = pytest.importorskip("av")
    wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)).astype(np.float32)
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or 960
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, frame_size=size)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    data = out.getvalue()
    assert MEDIA["audio"].sniff(data[:64]) == form
    decoded, found = decode_audio(data)
    assert found == rate and 1.9 < len(decoded) / rate < 2.2
    assert np.abs(np.fft.rfft(decoded[:rate])).argmax() == 440
    for limits in (data[: len(data) // 3], data[:40]):
        with pytest.raises(MediaError):
            decode_audio(limits)


def test_a_format_whose_decoder_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "av", None)
    put(tmp_path / "in/a.heic", b"\0\0\0\x18ftypheic" + bytes(60))
    put(tmp_path / "in/b.m4a", b"\0\0\0\x18ftypM4A " + bytes(60))
    put(tmp_path / "in/c.png", image(1))
    dataset, rejects = made(tmp_path / "in")
    assert len(dataset) == 1
    for name in ("a.heic", "b.m4a"):
        assert "needs the extra media: pip install" in rejects[name, None]
    assert any("needs the extra media" in warning for warning in dataset.manifest.warnings)


@pytest.mark.parametrize("near", [True, False])
def test_records_that_repeat_another_are_listed(tmp_path: Path, near: bool) -> None:
    rows = [{"id": f"r{n}", "text": f"some words and number {n % 7}", "label": str(n % 7 % 2)} for n in range(20)]
    dataset, _ = made(put(tmp_path / "t.jsonl", lines(*rows)), near_duplicates=near)
    listed = [json.loads(line) for line in (tmp_path / "out/duplicates.jsonl").read_text().splitlines()]
    pairs = {(e["first"]["id"], e["second"]["id"]) for e in listed if e["kind"] == "record"}
    assert pairs == {(f"r{n % 7}", f"r{n}") for n in range(7, 20)} and dataset.manifest.duplicates == len(pairs)
    assert all(
        e["first"]["source"].startswith("t.jsonl:") and e["distance"] == 0 for e in listed if e["kind"] == "record"
    )
