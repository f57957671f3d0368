"""A shop whose products are emoji, and buyers who do not exist: SYNTHETIC data, for trying recommending with images.

    python bench/make_buyers.py FOLDER-OR-ZIPS -o shop      # the folder holds emoji.jsonl and a zip of the images
    plait train shop -o runs/products --recipe products

Each buyer has two tastes, drawn among the subgroups of Unicode (cat faces, fruit, ...). Three purchases in four are of
the taste of the moment, which changes now and then; the others are any product. The shop's tables do not tell the
subgroups: a model knows a product by its image, its name and who bought it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np

BUYERS, SHORTEST, LONGEST = 4000, 8, 16
OF_TASTE, CHANGES = 0.75, 0.3


def products(source: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (source / "emoji.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["subgroup"]]


def purchases(tastes: np.ndarray, seed: int) -> list[list[int]]:
    """What each buyer buys, in order; nobody buys a thing twice. `tastes` (N,) are the products' subgroups."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(tastes == taste) for taste in range(tastes.max() + 1)]
    share = np.array([len(some) for some in members]) / len(tastes)
    found = []
    for _ in range(BUYERS):
        mine = rng.choice(len(members), 2, replace=False, p=share)
        at, bought = 0, list[int]()
        for _ in range(int(rng.integers(SHORTEST, LONGEST + 1))):
            at = 1 - at if rng.random() < CHANGES else at
            some = members[mine[at]] if rng.random() < OF_TASTE else np.arange(len(tastes))
            left = np.setdiff1d(some, bought)
            if len(left):
                bought.append(int(rng.choice(left)))
        found.append(bought)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("shop"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = products(options.source)
    names = sorted({row["subgroup"] for row in rows})
    tastes = np.array([names.index(row["subgroup"]) for row in rows])
    for path in options.source.glob("*.zip"):
        with zipfile.ZipFile(path) as file:
            inside = {Path(name).name: name for name in file.namelist()}
            for row in rows:
                if row["file"] in inside:
                    (options.out / row["file"]).write_bytes(file.read(inside[row["file"]]))
    for row in rows:
        if (options.source / row["file"]).is_file():
            shutil.copy(options.source / row["file"], options.out)
    with (options.out / "items.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"id": row["hexcode"], "title": row["name"], "image": row["file"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with (options.out / "interactions.txt").open("w", encoding="utf-8") as file:
        for buyer, bought in enumerate(purchases(tastes, options.seed)):
            file.write(" ".join([f"buyer{buyer}", *(rows[i]["hexcode"] for i in bought)]) + "\n")
    print(f"{len(rows)} products, {BUYERS} synthetic buyers with {len(names)} tastes: {options.out}")


if __name__ == "__main__":
    main()
