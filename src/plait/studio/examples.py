"""Three examples to begin with, made on the spot: digits, questions with answers, films."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.studio.workspace import Project, Workspace

FAQ = [
    ("When are you open?", "We are open from 9 to 18, Monday to Saturday."),
    ("Are you open on Sundays?", "We are closed on Sundays."),
    ("Where can I find your shop?", "Our shop is at 12 Market Street, beside the library."),
    ("Is there parking nearby?", "There is a free car park behind the building."),
    ("How do I return a purchase?", "Bring it back within 30 days with the receipt, and you get your money back."),
    ("Can I exchange a wrong size?", "Sizes are exchanged free of charge within 30 days."),
    ("How long does delivery take?", "Parcels arrive within two to three working days."),
    ("What does shipping cost?", "Shipping costs 4.90; above 50 it is free."),
    ("Do you ship abroad?", "We ship to all countries of the European Union."),
    ("Which ways of paying do you take?", "You can pay by card, bank transfer or cash."),
    ("Can I pay by invoice?", "Invoices are for companies that are registered with us."),
    ("How do I change my password?", "Open your account, choose Security, then Change password."),
    ("I forgot my login, what now?", "Choose Forgot login on the sign-in page; we send you a link by e-mail."),
    ("How can I delete my account?", "Write to us from your address, and we delete the account within a week."),
    ("Do you repair old devices?", "We repair what we sold, also after the guarantee; bring it to the shop."),
    ("How long is the guarantee?", "Everything has a guarantee of two years."),
    ("Can I get a gift voucher?", "Vouchers from 10 upwards are sold at the till and on our site."),
    ("Do students pay less?", "Students get ten percent off with their card."),
    ("Whom do I call with a complaint?", "Call 555 0100 on working days from 9 to 17."),
    ("Are dogs allowed in?", "Dogs on a lead are welcome."),
]
GENRES = {
    "space": ["Red Orbit", "Dust of Mars", "The Last Probe", "Zero Gravity", "Signal from Vega", "Night Landing"],
    "crime": ["The Quiet Witness", "Alibi", "Harbour at Night", "Second Suspect", "Cold Ledger", "The Forger"],
    "love": ["Summer Letters", "Two Tickets", "The Bakery", "Rain in June", "Dance Class", "Postcards"],
    "comedy": ["Wrong Floor", "The Goat", "Uncle Pays", "Lost Luggage", "Best Man", "Neighbours"],
    "nature": ["River Year", "Wolves", "The Long Coast", "Under Ice", "Meadow", "Forest at Dawn"],
}
USERS = 400


def digits(folder: Path) -> None:
    """Handwritten digits (UCI, by scikit-learn), 60 a class, in class folders."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    made = dict.fromkeys(names, 0)
    for number, (pixels, digit) in enumerate(zip(found.images, found.target, strict=True)):
        name = names[int(digit)]
        if made[name] == 60:
            continue
        made[name] += 1
        (folder / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / name / f"{number:04d}.png")


def questions(folder: Path) -> None:
    """Questions of a shop's customers with replies, as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "faq.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question", "reply"), *FAQ])


def films(folder: Path) -> None:
    """What 400 viewers saw, each with two favourite genres, as a table of interactions."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(GENRES)
    with (folder / "interactions.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("user", "item", "time"))
        for user in range(USERS):
            draw = uniform(11, user, np.arange(40))
            favourites = [kinds[int(draw[0] * 5)], kinds[int(draw[1] * 5)]]
            seen: list[str] = []
            for n in range(8 + int(draw[2] * 4)):
                kind = favourites[n % 2] if draw[3 + n] < 0.85 else kinds[int(draw[20 + n] * 5)]
                titles = [title for title in GENRES[kind] if title not in seen]
                if titles:
                    seen.append(titles[int(draw[30] * 7919 + n) % len(titles)])
            rows.writerows((f"viewer {user}", title, 1_700_000_000 + 86_400 * n) for n, title in enumerate(seen))


EXAMPLES: dict[str, Callable[[Path], None]] = {"digits": digits, "questions": questions, "films": films}


def make(workspace: Workspace, name: str) -> Project:
    """A new project with an example's files. Raises PlaitError for a name that is none."""
    if name not in EXAMPLES:
        raise PlaitError(f"There is no example '{name}'. There are {', '.join(EXAMPLES)}.")
    project = workspace.create(workspace.free_name(name))
    EXAMPLES[name](project.uploads)
    return project
