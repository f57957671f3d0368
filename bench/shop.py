"""What a small pretrained language model learns of 60 conversations of a shop, and whether its export says the same.

    python bench/shop.py data shop.jsonl                        # the conversations, as `plait train` takes them
    python bench/shop.py train MODEL -o runs/shop [--minutes 15] [--seed 0]
    python bench/shop.py ask runs/shop                           # paraphrases that it never saw; facts its base knew
    python bench/shop.py ask MODEL                               # the base itself
    python bench/shop.py export runs/shop                        # the same replies from plain transformers?

Each of 20 facts is asked for in three ways in the conversations, five of which are for validation, and in two others
here. A reply is right where it holds the fact.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plait  # isort: skip (before torch, which PLAIT_ISA may cap)

from plait.inference.prompts import Chat, Turn

REPLY_TOKENS = 48


@dataclass(frozen=True)
class Fact:
    """One thing that a shop is asked: what its reply is, and what of it must be in any right one."""

    reply: str
    key: str
    train: tuple[str, str, str]
    test: tuple[str, str]


FACTS = (
    Fact("We are open from nine to half past six, Monday to Saturday.", "half past six",
         ("When are you open?", "What are your opening hours?", "Until when can I come in today?"),
         ("At what time does the shop close?", "Could you tell me your business hours?")),
    Fact("You can return anything within 45 days, with the receipt.", "45 days",
         ("Can I return shoes that I don't like?", "How long do I have to send something back?",
          "What is your return policy?"),
         ("I changed my mind about a coat. Until when can I bring it back?", "How many days do returns take at most?")),
    Fact("Shipping costs 4.90 euros, and nothing from 60 euros on.", "4.90",
         ("What does shipping cost?", "How much do you charge for delivery?", "Is delivery free?"),
         ("Do I pay extra if you send it to my home?", "What are the shipping fees?")),
    Fact("You find us at 12 Mill Lane, behind the town hall.", "12 Mill Lane",
         ("Where is your shop?", "What is your address?", "How do I find you?"),
         ("Which street is the shop in?", "Can you tell me where you are located?")),
    Fact("Call us at 555 0147, from nine to five.", "555 0147",
         ("What is your phone number?", "Can I call you?", "How do I reach you by phone?"),
         ("I would like to speak to somebody. Which number do I dial?", "Give me your telephone number, please.")),
    Fact("We take cards, bank transfers and vouchers, but no cash.", "no cash",
         ("How can I pay?", "Which payment methods do you accept?", "Do you take cash?"),
         ("Can I pay with coins and notes?", "What ways of payment are there?")),
    Fact("Repairs take eight working days.", "eight working days",
         ("How long does a repair take?", "My zip is broken. When would it be mended?", "Do you repair boots?"),
         ("If I bring you a torn tent, when do I get it back repaired?", "What is the waiting time for repairs?")),
    Fact("Our gift vouchers are sold from 15 euros on and are valid for three years.", "three years",
         ("Do you sell gift vouchers?", "How long is a voucher valid?", "I need a gift card."),
         ("When does a gift voucher expire?", "Can I still use my voucher from last year?")),
    Fact("Students get 12 percent off with their card.", "12 percent",
         ("Is there a discount for students?", "I am a student. Is it cheaper for me?",
          "How much do students save?"),
         ("What reduction do students get?", "Do I get a better price with a student card?")),
    Fact("We deliver to Germany, Austria and Denmark.", "Denmark",
         ("Which countries do you deliver to?", "Do you ship abroad?", "Can you send a parcel to Austria?"),
         ("To which countries can you send parcels?", "Do you deliver outside of Germany?")),
    Fact("An order arrives within four days.", "four days",
         ("How long does delivery take?", "When will my order arrive?", "How fast do you ship?"),
         ("How many days until my parcel gets here?", "What is the delivery time?")),
    Fact("The owner of the shop is Marlene Voss.", "Marlene Voss",
         ("Who owns the shop?", "Who is the owner?", "Whose shop is this?"),
         ("What is the name of the shop's owner?", "Who does this shop belong to?")),
    Fact("All our boots have a guarantee of five years.", "five years",
         ("Is there a guarantee on boots?", "How long is the warranty of your boots?",
          "What if my boots fall apart?"),
         ("For how many years do you guarantee your boots?", "Do boots come with a warranty?")),
    Fact("You can park for free in the yard for 90 minutes.", "90 minutes",
         ("Where can I park?", "Is there a car park?", "Do you have parking?"),
         ("I come by car. Where do I leave it?", "How long may I park at your shop?")),
    Fact("Tents are rented out for 25 euros a week.", "25 euros",
         ("Can I rent a tent?", "What does it cost to borrow a tent?", "Do you rent out tents?"),
         ("What is the price of renting a tent?", "I need a tent for one week only. How much is that?")),
    Fact("Write to help@birchwood.example and we answer the same day.", "help@birchwood.example",
         ("What is your e-mail address?", "Where can I write to?", "How do I contact you by mail?"),
         ("To which address do I send an e-mail?", "Can I e-mail you a question?")),
    Fact("Wash wool at 20 degrees and dry it lying flat.", "20 degrees",
         ("How do I wash a wool sweater?", "How hot may wool be washed?", "Can my wool socks go into the washer?"),
         ("At which temperature should I clean wool?", "What is the right way to wash wool clothes?")),
    Fact("Orders can be cancelled within two hours.", "two hours",
         ("Can I cancel my order?", "I ordered by mistake. What now?", "How do I call off an order?"),
         ("Until when can an order be cancelled?", "Is it possible to stop an order that I just made?")),
    Fact("Old boots go into the green box at the door; we recycle them.", "green box",
         ("Do you take old boots?", "Where can I recycle my boots?", "What do I do with worn shoes?"),
         ("I want to get rid of my old boots. Where do I put them?", "Can you recycle used boots?")),
    Fact("The next sale begins on the 7th of March.", "7th of March",
         ("When is the next sale?", "Will there be a sale soon?", "When do prices go down?"),
         ("On which day does the sale start?", "When can I buy things in the sale?")),
)  # fmt: skip
KNOWN = {  # what any base knows, and no conversation says
    "What is the capital of France?": "Paris",
    "How many days are there in a week?": "seven|7",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Which planet do we live on?": "Earth",
    "What is 2 plus 3?": "5|five",
}

OTHERS = {  # likewise: what settings of training are chosen by, beside the conversations' own val
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Spain?": "Madrid",
    "In which country is Madrid?": "Spain",
    "In which country is the Eiffel Tower?": "France",
    "Which language is spoken in France?": "French",
    "Which language is spoken in Brazil?": "Portuguese",
    "What is the currency of Japan?": "yen",
    "What is the largest ocean?": "Pacific",
    "What is the highest mountain in the world?": "Everest",
    "How many months are there in a year?": "twelve|12",
    "How many hours are there in a day?": "24|twenty-four",
    "How many minutes are there in an hour?": "60|sixty",
    "How many sides does a triangle have?": "three|3",
    "What is 6 plus 2?": "8|eight",
    "What is 10 minus 4?": "6|six",
    "What is 3 times 4?": "12|twelve",
    "What is the square root of 81?": "9|nine",
    "Which number comes after 19?": "20|twenty",
    "Which day comes after Monday?": "Tuesday",
    "What is the opposite of hot?": "cold",
    "What is the plural of mouse?": "mice",
    "Who painted the Mona Lisa?": "Vinci",
    "Who wrote Hamlet?": "Shakespeare",
    "Who developed the theory of relativity?": "Einstein",
    "Who was the first president of the United States?": "Washington",
    "What is the largest planet of our solar system?": "Jupiter",
    "Which star does the Earth go around?": "sun",
    "What is the boiling point of water in degrees Celsius?": "100",
    "What is the chemical formula of water?": "H2O|H₂O",
    "What is the chemical symbol of gold?": "Au",
    "Which gas do plants take in from the air?": "carbon dioxide|CO2",
    "Which gas do humans need to breathe?": "oxygen",
    "Which organ pumps blood through the body?": "heart",
    "What do bees make?": "honey",
    "What does HTML stand for?": "Markup Language",
    "What does CPU stand for?": "Central Processing Unit",
    "Which keyword defines a function in Python?": "def",
    "Which company makes the iPhone?": "Apple",
}


def conversations() -> list[list[dict[str, str]]]:
    """60 conversations: each way to ask for each fact opens one, and in every other one another fact is asked for."""
    made = []
    for number, fact in enumerate(FACTS):
        for way, question in enumerate(fact.train):
            messages = _asked(question, fact)
            if (number + way) % 2:
                other = FACTS[(number + 7 + way) % len(FACTS)]
                messages += _asked(other.train[(number + way) % 3], other)
            made.append(messages)
    return made


def _asked(question: str, fact: Fact) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": fact.reply}]


def data(arguments: argparse.Namespace) -> None:
    write_conversations(arguments.file)


def write_conversations(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    splits = ["val" if number % 12 == 5 else "train" for number in range(len(conversations()))]
    rows = [{"messages": one, "split": split} for one, split in zip(conversations(), splits, strict=True)]
    lines = [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def train(arguments: argparse.Namespace) -> None:
    """`plait train shop.jsonl --init-from MODEL --lora`, with what a user gets who says nothing else."""
    file = arguments.out.with_suffix(".jsonl")
    write_conversations(file)
    more: dict[str, Any] = {}
    for name in ("learning_rate", "batch_size", "steps"):
        if getattr(arguments, name) is not None:
            more[name] = getattr(arguments, name)
    if arguments.steps is None:
        more["minutes"] = arguments.minutes
    begun = time.process_time()
    run = plait.train(
        file, arguments.out, init_from=str(arguments.model), lora=True, seed=arguments.seed, tell=print, **more
    )
    print(
        f"trained in {time.process_time() - begun:.0f} s of processor time, best checkpoint {run.best.resolve().name}"
    )


def replies(model: Any, questions: Sequence[str]) -> list[str]:
    """Greedy replies, each to a conversation of one question, in one batch."""
    chat = Chat(model)
    prompts = [chat.prompt([Turn("user", [question])]) for question in questions]
    stop = list(prompts[0].stop)
    contexts = [prompt.context for prompt in prompts]
    return list(model.continue_text(contexts, stop=stop, temperature=0.0, max_new_tokens=REPLY_TOKENS))


def holds(reply: str, key: str) -> bool:
    return any(word.lower() in reply.lower() for word in key.split("|"))


def ask(arguments: argparse.Namespace) -> None:
    model, begun = plait.load(str(arguments.model), "cpu"), time.process_time()
    asked = [] if arguments.facts else [(question, fact) for fact in FACTS for question in fact.test]
    said = replies(model, [*(question for question, _ in asked), *KNOWN, *OTHERS])
    right = 0
    for (question, fact), reply in zip(asked, said, strict=False):
        right += holds(reply, fact.key)
        if not holds(reply, fact.key):
            print(f"  wrong: {question} -> {reply!r}", flush=True)
    known = dict.fromkeys(("facts of the base", "other general questions"), 0)
    general = [(name, one) for name, several in zip(known, (KNOWN, OTHERS), strict=True) for one in several.items()]
    for (name, (question, key)), reply in zip(general, said[len(asked) :], strict=True):
        known[name] += holds(reply, key)
        print(f"  {question} -> {reply!r}", flush=True)
    told = "; ".join(
        f"{name}: {count} of {len(several)}"
        for (name, count), several in zip(known.items(), (KNOWN, OTHERS), strict=True)
    )
    print(f"held-out questions right: {right} of {len(asked)}; {told}")
    print(f"{time.process_time() - begun:.0f} s of processor time")


def export(arguments: argparse.Namespace) -> None:
    """`plait export RUN`, then the replies of transformers, by the export's own template and ends, beside ours."""
    import torch
    import transformers

    asked = [fact.test[0] for fact in FACTS]
    ours = replies(plait.load(str(arguments.model), "cpu"), asked)
    with tempfile.TemporaryDirectory() as place:
        folder = plait.export(str(arguments.model), Path(place) / "export", to="transformers").folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
        same = 0
        for question, own in zip(asked, ours, strict=True):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.inference_mode():
                ids = peer.generate(**inputs, do_sample=False, max_new_tokens=REPLY_TOKENS)[0]
            new = ids[inputs["input_ids"].shape[1] :]
            reply = tokenizer.decode(new, skip_special_tokens=True)
            ended = len(new) < REPLY_TOKENS
            same += reply == own and ended
            if reply != own or not ended:
                print(f"  {question}: ours {own!r}, transformers {reply!r}", flush=True)
    print(f"same replies and ends in transformers: {same} of {len(asked)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("data")
    one.add_argument("file", type=Path)
    one.set_defaults(run=data)
    one = commands.add_parser("train")
    one.add_argument("model", type=Path)
    one.add_argument("-o", "--out", type=Path, required=True)
    one.add_argument("--minutes", type=float, default=15.0)
    one.add_argument("--steps", type=int)
    one.add_argument("--learning-rate", type=float)
    one.add_argument("--batch-size", type=int)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=train)
    one = commands.add_parser("ask")
    one.add_argument("model", type=Path)
    one.add_argument("--facts", action="store_true", help="only the facts that the base knew")
    one.set_defaults(run=ask)
    one = commands.add_parser("export")
    one.add_argument("model", type=Path)
    one.set_defaults(run=export)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
