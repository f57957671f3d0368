"""Auto-reply on written questions: 40 pairs, 20 paraphrases of some of them, 10 messages that they do not answer.

    python bench/faq.py [bicycles library shop swimming] [--encoder HF_FOLDER]

Each folder of bench/faq was written by hand and committed before anything was run on it. `library`, `shop` and
`bicycles` are what auto-reply was chosen by; of `library`'s paraphrases hardly a word stands in the pair. `swimming`
chose nothing. Prints how many messages got the right reply and a wrong one, how many of what cannot be answered met
silence, and how often TF-IDF of words alone finds the pair.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer

import plait
from plait.chat.replies import Replies

FOLDER = Path(__file__).parent / "faq"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measure(name: str, encoder: str | None) -> str:
    """What auto-reply does on a folder of questions."""
    pairs, asked, others = (read(FOLDER / name / f"{part}.csv") for part in ("pairs", "questions", "unanswerable"))
    wanted = {pair["question"]: pair["reply"] for pair in pairs}
    with tempfile.TemporaryDirectory() as scratch:
        dataset = plait.prepare(FOLDER / name / "pairs.csv", scratch, progress=False)
        embed = plait.load(encoder).embed_inputs if encoder else None
        replies = Replies(dataset, embed=embed)
        replies.fit()
        answers = replies.answer([row["message"] for row in asked])
        silent = sum(answer.reply is None for answer in replies.answer([row["message"] for row in others]))
    truth = [wanted[row["question"]] for row in asked]
    right = sum(answer.reply == reply for answer, reply in zip(answers, truth, strict=True))
    wrong = sum(answer.reply not in (reply, None) for answer, reply in zip(answers, truth, strict=True))
    nearest = sum(answer.sources[0].reply == reply for answer, reply in zip(answers, truth, strict=True))
    grams = TfidfVectorizer(stop_words="english")
    table = grams.fit_transform([pair["question"] for pair in pairs])
    best = (grams.transform([row["message"] for row in asked]) @ table.T).argmax(1)
    simple = sum(pairs[int(i)]["reply"] == reply for i, reply in zip(best.flat, truth, strict=True))
    return (
        f"{name}: {right} right and {wrong} wrong of {len(asked)}, {silent} of {len(others)} silent; "
        f"the right pair is nearest to {nearest}, by TF-IDF alone to {simple}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))
    parser.add_argument("--encoder", help="a text encoder: a Hugging Face name or folder")
    options = parser.parse_args()
    for name in options.folders:
        print(measure(name, options.encoder), flush=True)


if __name__ == "__main__":
    main()
