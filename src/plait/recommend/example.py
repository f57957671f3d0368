"""An example of histories: `plait example histories`."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from plait.data.examples import Example

GENRES = ("comedy", "drama", "thriller", "western")
FILMS, VIEWERS, WATCHED = 40, 200, 12


def _write_histories(folder: Path) -> None:
    """Viewers who stay with one of four genres three times in four."""
    draw = random.Random(0)
    films = [(f"f{n:02d}", f"{GENRES[n % 4].title()} {n // 4 + 1}", GENRES[n % 4]) for n in range(FILMS)]
    with (folder / "items.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "title", "categories"])
        table.writerows(films)
    with (folder / "interactions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["user", "item", "time"])
        for viewer in range(VIEWERS):
            taste = [film for film in films if film[2] == GENRES[viewer % 4]]
            seen: list[str] = []
            while len(seen) < WATCHED:
                film = draw.choice(taste if draw.random() < 0.75 else films)[0]
                if film not in seen:
                    seen.append(film)
                    table.writerow([viewer, film, 1_700_000_000 + 86_400 * len(seen)])


EXAMPLE = Example("histories", "what 200 viewers watched of 40 films", _write_histories, "films")
