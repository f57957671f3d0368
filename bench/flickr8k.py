"""R@10 among the 1,000 test photos of Flickr8k: a caption finds its photo, a photo one of its five captions.

    plait train FOLDER -o runs/flickr8k --recipe recipes/flickr8k.yaml
    python bench/flickr8k.py runs/flickr8k

`plait evaluate` counts records, of which each photo has five here; this counts every photo once. Chance is 10 of 1,000
for a caption, and the same to two digits for a photo: one of five captions among the first 10 of 5,000.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from plait.data.dataset import Dataset
from plait.inference.model import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="the prepared dataset; the run's own where left out")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    model, dataset = load(options.run), Dataset.open(options.data or options.run / "data")
    photos: dict[bytes, list[dict[str, str | bytes]]] = {}
    for record in dataset.iterate(dataset.indices(options.split).tolist()):
        photos.setdefault(bytes(record.parts["image"]), []).append(record.parts)
    seen = np.concatenate([model.embed(list(photos)[at : at + 256]) for at in range(0, len(photos), 256)])
    for column in [name for name, kind in dataset.columns.items() if kind == "text"]:
        said = [(i, str(parts[column])) for i, rows in enumerate(photos.values()) for parts in rows if column in parts]
        owner = np.array([i for i, _ in said])
        near = seen @ model.embed([text for _, text in said]).T  # (photos, captions)
        own = near[owner, np.arange(len(said))]
        found = ((near > own).sum(0) < 10).mean()
        best = np.argpartition(-near, 9, axis=1)[:, :10]
        shown = (owner[best] == np.arange(len(seen))[:, None]).any(1).mean()
        print(
            f"{column}: caption -> photo R@10 {found:.3f} ({len(said)} captions), photo -> caption R@10 {shown:.3f} "
            f"({len(seen)} photos); chance {10 / len(seen):.3f}"
        )


if __name__ == "__main__":
    main()
