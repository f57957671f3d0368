"""Files of every shape -> a dataset: what is read, how it is split, what is refused and that nothing is lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.modalities.audio_files import encode_wav
from plait.modalities.image_files import decode_image, encode_png
from sources import lines, put

CORPORA = Path(__file__).parents[2] / "shared" / "corpora"


def make_image(n: int) -> bytes:
    return encode_png(np.random.default_rng(n).integers(0, 256, (6, 8, 3), np.uint8))


def make_audio(n: int, seconds: float = 0.05) -> bytes:
    return encode_wav(np.random.default_rng(n).uniform(-0.5, 0.5, int(8000 * seconds)), 8000)


def made(source: Path, out: Path, **options: Any) -> tuple[Dataset, list[dict[str, Any]]]:
    prepare(source, out, workers=options.pop("workers", 1), **options)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return Dataset.open(out, verify=True), rejects


def by_id(dataset: Dataset) -> dict[str, dict[str, str | bytes]]:
    return {record.id: record.parts for record in dataset.iterate()}


def test_metadata_names_media_of_any_kind(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for n in range(4):
        put(source / f"pics/{n}.png", make_image(n))
        put(source / f"{n}.wav", make_audio(n))
    put(source / "metadata.jsonl", lines(
        {"id": "a", "file_name": "pics/0.png", "voice_file_name": "0.wav", "text": "zero", "split": "train"},
        {"id": "b", "file_name": "pics/1.png", "voice_file_name": None, "text": "", "split": "validation"},
        {"id": "c", "file_name": "pics/9.png", "split": "train"},
        {"id": "d", "file_name": "../../etc/passwd.png", "split": "train"},
        {"id": "a", "file_name": "pics/2.png", "split": "train"},
        {"id": "e", "file_name": "pics/2.png", "text": "nul\0", "split": "train"},
        {"id": "f", "file_name": "pics/2.png", "text": "six", "split": "huh"},
    ) + "{broken\n" + '{"file_name": Infinity}\n')  # fmt: skip
    dataset, rejects = made(source, tmp_path / "out")
    assert dataset.columns == {"image": "image", "voice": "audio", "text": "text"}
    assert by_id(dataset) == {
        "a": {"image": make_image(0), "voice": make_audio(0), "text": "zero"},
        "b": {"image": make_image(1)},
    }
    assert [dataset.record(int(n)).id for n in dataset.indices("val")] == ["b"]
    reasons = {(r["file"], r["line"]): r["reason"] for r in rejects}
    assert "does not exist" in reasons["metadata.jsonl", 3]
    assert "leads out of the source" in reasons["metadata.jsonl", 4]
    assert "stands there twice" in reasons["metadata.jsonl", 5]
    assert "NUL" in reasons["metadata.jsonl", 6]
    assert "unknown split" in reasons["metadata.jsonl", 7]
    assert "not valid JSON" in reasons["metadata.jsonl", 8] and "Infinity" in reasons["metadata.jsonl", 9]
    assert reasons["pics/3.png", None] == "no table names it"


def test_class_folders_same_stem_texts_and_split_folders(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for n, (split, label) in enumerate((s, c) for s in ("train", "test") for c in ("cat", "dog") for _ in range(3)):
        put(source / split / label / f"{n}.png", make_image(n))
    put(source / "train/cat/0.txt", "a cat\n")
    put(source / "train/cat/0.wav", make_audio(1))
    put(source / "train/cat/bad.png", b"not an image")
    put(source / "train/cat/empty.png", b"")
    put(source / "notes.md", "hello")
    (source / "link.png").symlink_to("/etc/hostname")
    dataset, rejects = made(source, tmp_path / "out")
    assert dataset.columns == {"image": "image", "audio": "audio", "text": "text", "label": "text"}
    first = by_id(dataset)["train/cat/0.png"]
    assert first == {"image": make_image(0), "audio": make_audio(1), "text": "a cat", "label": "cat"}
    assert len(dataset.indices("test")) == 6 and len(dataset) == 12
    assert {r["file"] for r in rejects} == {"train/cat/bad.png", "train/cat/empty.png", "notes.md", "link.png"}
    assert dataset.manifest.statistics["label"].classes == {"cat": 6, "dog": 6}


def test_archives_and_patterns(tmp_path: Path) -> None:
    archive = tmp_path / "digits.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for n in range(6):
            file.writestr(f"rec/{n % 2}_ann_{n}.wav", make_audio(n))
        file.writestr("../evil.wav", make_audio(9))
        file.writestr("rec/odd.wav", make_audio(8))
    dataset, rejects = made(archive, tmp_path / "out", pattern=r"(?P<label>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.wav")
    assert by_id(dataset)["rec/1_ann_3.wav"] == {"audio": make_audio(3), "label": "1", "speaker": "ann", "index": "3"}
    assert {r["file"] for r in rejects} == {"../evil.wav", "rec/odd.wav"} and len(dataset) == 6
    assert not list((tmp_path / "out").rglob(".unpacked")) and not (tmp_path / "evil.wav").exists()
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as packed:
        for n in range(4):
            info = tarfile.TarInfo(f"{'train' if n < 2 else 'test'}/{'ab'[n % 2]}/{n}.png")
            info.size = len(make_image(n))
            packed.addfile(info, io.BytesIO(make_image(n)))
    dataset, _ = made(tmp_path / "c.tar.gz", tmp_path / "out2")
    assert list(dataset.texts("label")) == ["a", "b", "a", "b"] and len(dataset.indices("test")) == 2


def test_a_table_finds_its_media_in_an_archive_beside_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(put(tmp_path / "in/pics.zip", b""), "w") as file:
        for n in range(3):
            file.writestr(f"{n}.png", make_image(n))
    with (tmp_path / "in/list.csv").open("w", newline="") as table:
        csv.writer(table).writerows([["file", "caption"], *([f"{n}.png", f"no, {n}\nline"] for n in range(3))])
    dataset, rejects = made(tmp_path / "in", tmp_path / "out")
    assert not rejects and dataset.columns == {"image": "image", "caption": "text"}
    assert sorted(str(t) for t in dataset.texts("caption")) == [f"no, {n}\nline" for n in range(3)]


def test_parquet_with_bytes_structs_and_named_classes(tmp_path: Path) -> None:
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({
        "image": [{"bytes": make_image(n), "path": f"{n}.png"} for n in range(5)],
        "clip": [make_audio(n) for n in range(5)],
        "label": [0, 1, 1, 0, 1],
        "score": [0.5, float("nan"), 1.0, 2.0, None],
    }).replace_schema_metadata({"huggingface": json.dumps(info)})  # fmt: skip
    (tmp_path / "in/data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "in/data/train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "in/data/test-00000-of-00001.parquet")
    put(tmp_path / "in/README.md", "card")
    dataset, _ = made(tmp_path / "in", tmp_path / "out")
    assert dataset.columns == {"image": "image", "clip": "audio", "label": "text", "score": "text"}
    assert len(dataset.indices("test")) == 1 and len(dataset) == 6
    assert ["score" in record.parts for record in dataset.iterate()].count(False) == 2  # NaN, and null
    assert dataset.manifest.overlap in ({"test/train": 1}, {"test/val": 1})
    record = dataset.record(int(dataset.indices("test")[0]))
    assert record.parts == {"image": make_image(0), "clip": make_audio(0), "label": "cat", "score": "0.5"}


def test_a_map_renames_ignores_and_makes_a_record_of_each_element(tmp_path: Path) -> None:
    put(tmp_path / "t.jsonl", lines({"p": "x", "say": ["a", "b"], "n": 1}, {"p": "y", "say": ["c"], "n": 0}))
    options = {"column_map": {"text": "p:prompt", "say": "each:answer"}, "labels": {"n": ["no", "yes"]}}
    dataset, _ = made(tmp_path / "t.jsonl", tmp_path / "out", **options)
    got = sorted(tuple(parts.values()) for parts in by_id(dataset).values())
    assert got == [("x", "a", "yes"), ("x", "b", "yes"), ("y", "c", "no")] and "prompt" in dataset.columns
    dataset, _ = made(tmp_path / "t.jsonl", tmp_path / "out", column_map={"ignore": "p,n"})
    assert dataset.columns == {"say": "text"} and sorted(map(str, dataset.texts("say"))) == ["a\nb", "c"]
    for wrong in ({"image": "nope"}, {"p": "smell"}):
        with pytest.raises(PlaitError, match="--map"):
            made(tmp_path / "t.jsonl", tmp_path / "out", column_map=wrong)


def test_idx_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 20)):
        pixels, labels = rng.integers(0, 256, (count, 5, 4), np.uint8), rng.integers(0, 3, count, np.uint8)
        head = b"\0\0\x08"
        put(tmp_path / f"in/{prefix}-images-idx3-ubyte.gz", gzip.compress(
            head + b"\x03" + struct.pack(">III", *pixels.shape) + pixels.tobytes()))  # fmt: skip
        put(tmp_path / f"in/{prefix}-labels-idx1-ubyte", head + b"\x01" + struct.pack(">I", count) + labels.tobytes())
    dataset, rejects = made(tmp_path / "in", tmp_path / "out", labels={"label": ["shirt", "boot", "bag"]})
    assert not rejects and dataset.manifest.counts["test"] == 20 and 5 <= dataset.manifest.counts["val"] <= 40
    at = dataset.ids.index("t10k:19")
    record = dataset.record(at)
    assert np.array_equal(np.asarray(decode_image(bytes(record.parts["image"]))), pixels[19])  # type: ignore[arg-type]
    assert record.parts["label"] == ["shirt", "boot", "bag"][labels[19]] and record.split == "test"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60), min_size=1),
       st.integers(1, 4000))  # fmt: skip
def test_one_text_is_cut_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], times: int
) -> None:
    text = ("\n".join(words) + "\r\n") * times
    folder = tmp_path_factory.mktemp("text")
    dataset, _ = made(put(folder / "book.txt", text.removeprefix("\ufeff")), folder / "out", workers=0)
    pieces = [str(piece) for piece in dataset.texts("text")]
    text = text.removeprefix("\ufeff")
    assert "".join(pieces) == text and max(map(len, pieces)) <= 8192
    train = "".join(pieces[int(n)] for n in dataset.indices("train"))
    assert train == text[: int(0.9 * len(text))] or len(text) < 2


def test_text_files_and_text_faults(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path / f"in/{n}.txt", f"text {n}")
    put(tmp_path / "in/latin.txt", "caf\xe9".encode("latin-1"))
    put(tmp_path / "in/nul.txt", b"a\0b")
    dataset, rejects = made(tmp_path / "in", tmp_path / "out")
    assert sorted(map(str, dataset.texts("text"))) == ["text 0", "text 1", "text 2"]
    assert {r["file"]: r["reason"].split(":")[0] for r in rejects} == {
        "latin.txt": "not UTF-8", "nul.txt": "column 'text'"}  # fmt: skip


def test_duplicates_share_a_split_and_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"number {n % 300}"} for n in range(600)]
    dataset, _ = made(put(tmp_path / "t.jsonl", lines(*rows)), tmp_path / "out")
    assert dataset.manifest.duplicates == 300 and dataset.manifest.overlap == {}
    assert dataset.manifest.texts_distinct == {"text": 300}
    counts = dataset.manifest.counts
    assert sum(counts.values()) == 600 and counts["train"] > 420 and min(counts.values()) > 20


def test_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    for n in range(40):
        put(tmp_path / f"in/{'ab'[n % 2]}/{n}.png", make_image(n) if n % 7 else b"bad")
    folders = []
    for workers in (0, 1, 3):
        prepare(tmp_path / "in", tmp_path / f"out{workers}", workers=workers)
        folders.append({path.name: path.read_bytes() for path in (tmp_path / f"out{workers}").iterdir()})
    assert folders[0] == folders[1] == folders[2]
    assert set(folders[0]) >= {"manifest.json", "rejects.jsonl", "report.html", "train-00000.parquet"}


def test_a_dataset_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    source = put(tmp_path / "a.jsonl", lines({"text": "one"}))
    prepare(source, tmp_path / "out")
    put(source, lines({"text": "one"}, {"text": "two"}))
    assert sum(prepare(source, tmp_path / "out").counts.values()) == 2
    other = put(tmp_path / "b.jsonl", lines({"text": "one"}))
    with pytest.raises(PlaitError, match="dataset made from"):
        prepare(other, tmp_path / "out")
    mine = put(tmp_path / "mine/letter.txt", "dear")
    with pytest.raises(PlaitError, match="is not a dataset"):
        prepare(source, mine.parent)
    assert mine.read_text() == "dear"
    with pytest.raises(PlaitError, match="Cannot write"):
        prepare(source, mine / "deeper")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in ((tmp_path / "empty", "is empty"), (tmp_path / "none", "does not exist"),
                            (put(tmp_path / "x/a.bin", b"\1\2\3").parent, "nothing that can be read"),
                            (put(tmp_path / "y/a.png", b"bad").parent, "no record can be used")):  # fmt: skip
        with pytest.raises(PlaitError, match=message):
            prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_mapped_split_column_and_val_from_train(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "part": "train" if n < 300 else "test"} for n in range(330)]
    dataset, _ = made(put(tmp_path / "t.jsonl", lines(*rows)), tmp_path / "out", column_map={"split": "part"})
    counts = dataset.manifest.counts
    assert counts["test"] == 30 and 10 <= counts["val"] <= 60 and dataset.columns == {"text": "text"}
    assert not {f"t{n}" for n in range(300, 330)} & {
        dataset.record(int(n)).parts["text"] for n in dataset.indices("val")
    }


_PARQUET = io.BytesIO()
pq.write_table(pa.table({"text": ["a", "b"] * 20, "n": [1, 2] * 20}), _PARQUET)
_FILES = {
    "t.csv": b'file,text\na.png,"x\ny"\nb,2\n,,\n',
    "t.jsonl": b'{"id":1,"text":"a"}\n{"id":2,"image":{"bytes":null,"path":"x.png"}}\n[1]\n',
    "t.json": b'[{"a":1},{"b":[1,{"c":null}]}]',
    "t.jsonl.gz": gzip.compress(b'{"a":1}\n' * 9),
    "t.parquet": _PARQUET.getvalue(),
    "t.txt": b"hello\nworld\n",
    "train-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">III", 2, 2, 2) + b"12345678",
}
_EDITS = st.tuples(
    st.floats(0, 1),
    st.sampled_from([b"\xff", b"\0", b"NaN", b'"', b"{", b"[", b"\\ud800", b"9" * 400, b",", b"\n", b"\r"]),
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(_FILES)), st.lists(_EDITS, max_size=4), st.floats(0, 1))
def test_damaged_files_end_in_a_dataset_or_an_error_for_people(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[float, bytes]], keep: float
) -> None:
    data = bytearray(_FILES[name])
    for place, value in edits:
        at = int(place * len(data))
        data[at : at + (len(value) == 1)] = value
    folder = tmp_path_factory.mktemp("damaged")
    put(folder / "in" / name, bytes(data[: max(1, int(len(data) * max(keep, 0.5)))]))
    try:
        dataset, _ = made(folder / "in", folder / "out", workers=0)
        assert len(list(dataset.iterate())) == len(dataset)
    except PlaitError as error:
        assert len(str(error)) < 600


def test_damage_of_a_dataset_is_found(tmp_path: Path) -> None:
    prepare(put(tmp_path / "a.jsonl", lines(*({"text": str(n)} for n in range(50)))), tmp_path / "out")
    shard = tmp_path / "out/train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(PlaitError, match=r"train-00000\.parquet is damaged"):
        Dataset.open(tmp_path / "out", verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(PlaitError, match=r"train-00000\.parquet is damaged"):
        Dataset.open(tmp_path / "out")
    shard.unlink()
    with pytest.raises(PlaitError, match=r"train-00000\.parquet is missing"):
        Dataset.open(tmp_path / "out")


def test_records_come_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "text": f"t{n}"} for n in range(3000)]
    dataset, _ = made(put(tmp_path / "t.jsonl", lines(*rows)), tmp_path / "out")
    order = np.random.default_rng(0).permutation(len(dataset))[:200]
    assert [record.id for record in dataset.iterate(order)] == [dataset.ids[n] for n in order]
    train = dataset.indices("train")
    assert np.array_equal(np.concatenate([train, dataset.indices("val"), dataset.indices("test")]), np.arange(3000))
    assert all(record.parts["text"] == "t" + record.id[1:] for record in dataset.iterate(order))


_LIMITED = """
import resource, sys
from plait.data.prepare import prepare
prepare(sys.argv[1], sys.argv[2], workers=2)
# VmHWM, not ru_maxrss of this process: that one is inherited from the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(not CORPORA.is_dir(), reason="../shared/corpora is not here")
def test_broken_media_of_the_corpora_are_used_or_listed(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("images_fuzzed.zip", "audio_odd.zip"):
        zipfile.ZipFile(CORPORA / name).extractall(source)
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(source), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stdout.split())) * (1 if sys.platform == "linux" else 1 / 1024) < 1 << 20
    dataset = Dataset.open(tmp_path / "out", verify=True)
    rejects = [json.loads(line)["file"] for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == len(set(rejects))
    assert set(rejects) | {record.source for record in dataset.iterate(columns=[])} == files


def test_the_report_stands_alone(tmp_path: Path) -> None:
    put(tmp_path / "in/<b>.png", make_image(1))
    put(tmp_path / "in/<b>.txt", "<script>alert(1)</script>")
    Image.new("RGB", (400, 300)).save(tmp_path / "in/big.jpg")
    made(tmp_path / "in", tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "http:" not in page and "https:" not in page and page.count("data:image/") == 2


def test_adding_files_decodes_only_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grown source, and other files added to a dataset: known media are not decoded, and what comes out is the same
    as from preparing all at once."""
    from plait.modalities.image_files import ImageFiles

    decoded: list[bytes] = []
    look = ImageFiles.look
    monkeypatch.setattr(ImageFiles, "look", lambda self, data, near: decoded.append(data) or look(self, data, near))

    def image(place: Path, n: int) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode_png(np.random.default_rng(n).integers(0, 256, (48, 48, 3), np.uint8)))

    for n in range(12):
        image(tmp_path / "in" / "ab"[n % 2] / f"{n}.png", n)
    prepare(tmp_path / "in", tmp_path / "out", workers=0)
    assert len(decoded) == 12
    for n in range(12, 16):
        image(tmp_path / "in" / "ab"[n % 2] / f"1{n}.png", n)
    decoded.clear()
    prepare(tmp_path / "in", tmp_path / "out", workers=0)
    assert len(decoded) == 4
    prepare(tmp_path / "in", tmp_path / "anew", workers=0)
    names = sorted(path.name for path in (tmp_path / "anew").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()

    before = Dataset.open(tmp_path / "out")
    split = {record.id: record.split for record in before.iterate()}
    for n in range(20, 25):
        image(tmp_path / "more" / "ab"[n % 2] / f"{n}.png", n)
    image(tmp_path / "more" / "a" / "again.png", 0)
    (tmp_path / "more" / "a" / "bad.png").write_bytes(b"no image")
    for _ in range(2):  # the second time nothing is new
        decoded.clear()
        prepare(tmp_path / "more", tmp_path / "out", workers=0, into=True)
        after = {record.id: record for record in Dataset.open(tmp_path / "out").iterate()}
        assert len(after) == 22 and split.items() <= {id_: record.split for id_, record in after.items()}.items()
    assert len(decoded) == 1  # the one that is none
    assert after["more/a/again.png"].split == split["a/0.png"] and after["more/b/21.png"].parts["label"] == "b"
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest.duplicates == 1 and manifest.source.endswith(" + " + str(tmp_path / "more"))
    reasons = [(one.file, one.reason) for one in Dataset.open(tmp_path / "out").rejects]
    assert ("more/a/bad.png", reasons[0][1]) in reasons


def test_texts_of_a_column_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """Any way of access gives what all records have, and only a few blocks are kept."""
    rows = [{"text": f"text {n}", **({"note": f"note {n}"} if n % 3 else {})} for n in range(9000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "rows.jsonl", tmp_path / "data", workers=0, near_duplicates=False)
    dataset = Dataset.open(tmp_path / "data")
    wanted = [record.parts.get("note") for record in dataset.iterate(columns=["note"])]
    texts = dataset.texts("note")
    assert list(texts) == wanted and len(texts) == 9000 and None in wanted
    places = np.random.default_rng(0).integers(0, 9000, 500)
    assert texts[places].tolist() == [wanted[i] for i in places] == [texts[i] for i in places]
    assert texts[-1] == wanted[-1] and texts[5:9] == wanted[5:9] and texts[np.zeros(0, int)].tolist() == []
    assert len(texts._blocks) <= texts.BLOCKS
    with pytest.raises(IndexError):
        texts[9000]


def test_few_texts_leave_something_for_val_and_test(tmp_path: Path) -> None:
    for n in range(9):
        put(tmp_path / f"in/{n}.txt", "".join(f"Line {line} of text {n}.\n" for line in range(2 if n == 4 else 800)))
    made(tmp_path / "in", tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert "Of each of the few text files the last tenth is for val and test, 1 short ones" in str(
        dataset.manifest.warnings
    )
    for n in range(9):
        own = [record for record in dataset.iterate() if record.source.startswith(f"{n}.")]
        texts = {split: "".join(str(record.parts["text"]) for record in own if record.split == split)
                 for split in ("train", "val", "test")}  # fmt: skip
        whole = (tmp_path / f"in/{n}.txt").read_text()
        assert "".join(texts.values()) == whole
        for split in ("val", "test"):
            assert len(texts[split]) == (0 if n == 4 else pytest.approx(len(whole) / 20, abs=1))


def test_few_records_leave_something_for_val_and_test(tmp_path: Path) -> None:
    for count in (10, 11, 12, 25):
        rows = [f"a line of its own, number {n} of {count}" for n in range(count)]
        put(tmp_path / f"{count}.csv", "text\n" + "".join(f'"{row}"\n' for row in rows))
        made(tmp_path / f"{count}.csv", tmp_path / f"out{count}")
        counts = Dataset.open(tmp_path / f"out{count}").manifest.counts
        assert min(counts.values()) >= 1 and counts["train"] >= 0.6 * count and sum(counts.values()) == count
