"""Synthetic data for chat, auto-reply, intents and emotions, made from templates and from voices of eSpeak NG.

    python bench/make_conversations.py FOLDER

writes, each ready for `plait prepare` or `plait train`:

    facts/facts.csv          statements about people of whom no two share all answers: text for a base to learn
    chat/chats.jsonl         conversations about them, as OpenAI's chat completions have them
    replies/pairs.csv        questions that a shop has answered, with its replies; in val and test also questions that
                             it never answered, without a reply
    intents/intents.csv      requests to a home assistant and what each wants
    feelings/feelings.csv    what people write and how they feel
    emotions/metadata.jsonl  the same few sentences spoken by many voices as five emotions audio

Phrasings of val and test do not occur in train, nor do voices, spoken sentences and the questions without an answer.
Everything is a function of the seed, 7. None of it is real: figures on it say that the machinery works, no more.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from plait.data.demo_data import Speech
from plait.modalities.audio_files import encode_wav, resample

SEED = 7
PEOPLE = [
    "Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kate", "Liam", "Mona", "Nora",
    "Otto", "Pia", "Quin", "Rosa", "Sam", "Tess", "Una", "Vic", "Wim", "Xena", "Yann", "Zoe", "Amir", "Bela",
    "Cara", "Dario", "Elsa", "Felix", "Gina", "Hank", "Ines", "Jonas", "Kira", "Lena", "Milo", "Nils",
]  # fmt: skip
RELATIONS = {
    "city": ["Oslo", "Lima", "Rome", "Cairo", "Paris", "Delhi", "Tokyo", "Quito"],
    "pet": ["cat", "dog", "parrot", "rabbit", "turtle", "horse", "snake", "hamster"],
    "job": ["baker", "nurse", "pilot", "farmer", "tailor", "judge", "miner", "singer"],
    "food": ["rice", "soup", "bread", "cheese", "fish", "plums", "beans", "cake"],
}
STATEMENTS = {
    "city": ["{n} lives in {v}.", "The home of {n} is {v}.", "{n} has a flat in {v}.", "You will find {n} in {v}."],
    "pet": ["{n} has a {v}.", "The pet of {n} is a {v}.", "{n} keeps a {v} at home.", "{n} walks with a {v}."],
    "job": ["{n} works as a {v}.", "The job of {n} is {v}.", "{n} is a {v} by trade.", "They hired {n} as a {v}."],
    "food": ["{n} likes {v} most.", "The favourite food of {n} is {v}.", "{n} eats {v} every day.", "{n} orders {v}."],
}  # fmt: skip
QUESTIONS = {  # the last two of each are asked in val and test alone
    "city": ["Where does {n} live?", "Where is the home of {n}?", "Which city does {n} live in?",
             "Where do I find {n}?",
             "Tell me where {n} lives.", "Do you know where {n} lives?", "In which city is the home of {n}?"],
    "pet": ["What pet does {n} have?", "Which pet does {n} keep?", "What is the pet of {n}?",
            "Which animal does {n} have?",
            "Tell me what pet {n} has.", "Do you know what pet {n} has?", "Which animal does {n} keep?"],
    "job": ["What does {n} work as?", "What is the job of {n}?", "Which job does {n} have?", "What is {n} by trade?",
            "Tell me what job {n} has.", "Do you know what job {n} has?", "Which job is that of {n}?"],
    "food": ["What does {n} like to eat?", "What is the favourite food of {n}?", "Which food does {n} like most?",
             "What does {n} eat?", "Tell me what food {n} likes.", "Do you know what food {n} likes?",
             "Which food is the favourite of {n}?"],
}  # fmt: skip
FOLLOW = {"city": "And the city?", "pet": "And the pet?", "job": "And the job?", "food": "And the food?"}
ANSWERS = {"city": "{n} lives in {v}.", "pet": "{n} has a {v}.", "job": "{n} works as a {v}.", "food": "{n} likes {v}."}


def facts() -> dict[tuple[str, str], str]:
    """(person, relation) -> value; drawn once."""
    draw = random.Random(SEED)
    return {(name, relation): draw.choice(values) for name in PEOPLE for relation, values in RELATIONS.items()}


def statements() -> Iterator[dict[str, str]]:
    for (name, relation), value in facts().items():
        for n, template in enumerate(STATEMENTS[relation]):
            # A base should know all facts: held out is one phrasing of each, of four.
            split = "test" if n == hash_of(name, relation) % 4 and n % 2 else "train"
            yield {"text": template.format(n=name, v=value), "split": split}


def hash_of(*words: str) -> int:
    return random.Random(f"{SEED} {' '.join(words)}").randrange(2**31)


def taught(name: str, relation: str) -> bool:
    """Whether conversations of train ask for this fact; the others a chat can only know from its base."""
    return hash_of("taught", name, relation) % 4 > 0


def conversations() -> Iterator[dict[str, object]]:
    known = facts()
    draw = random.Random(SEED + 1)
    learnt = [fact for fact in known if taught(*fact)]

    def asked(name: str, relation: str, template: str) -> list[dict[str, str]]:
        answer = ANSWERS[relation].format(n=name, v=known[name, relation])
        return [{"role": "user", "content": template.format(n=name)}, {"role": "assistant", "content": answer}]

    for name, relation in known:
        if taught(name, relation):
            for template in QUESTIONS[relation][:-2]:
                messages = asked(name, relation, template)
                if draw.random() < 0.5:  # another person next, or another question about the same one
                    who, what = draw.choice(learnt)
                    messages += asked(who, what, draw.choice(QUESTIONS[what][:-2]))
                elif others := [other for other in RELATIONS if other != relation and taught(name, other)]:
                    messages += asked(name, other := draw.choice(others), FOLLOW[other])
                yield {"messages": messages, "kind": "taught", "split": "train"}
        for split, template in zip(("val", "test"), QUESTIONS[relation][-2:], strict=True):
            kind = "taught" if taught(name, relation) else "base"
            yield {"messages": asked(name, relation, template), "kind": kind, "split": split}


# --- auto-reply: topics of a shop -------------------------------------------------------------------------------

TOPICS = {  # key words -> the reply; questions are made of the words and of frames
    ("open", "opening hours", "on Sunday"): "We are open from nine to six, and closed on Sundays.",
    ("return", "send back", "a jacket"): "You can send anything back within thirty days; the label is in the box.",
    ("track", "follow", "my parcel"): "The link in our e-mail shows where your parcel is.",
    ("pay", "use a card for", "an order"): "We take cards, transfers and cash on delivery.",
    ("change", "correct", "my address"): "Write us the new address before the parcel leaves, and we change it.",
    ("cancel", "call off", "a booking"): "Bookings can be cancelled free of charge up to two days before.",
    ("repair", "fix", "a broken zip"): "Bring it to the shop; most repairs take one week.",
    ("reset", "recover", "my password"): "Click 'forgotten' on the login page and we mail you a new one.",
    ("park", "leave", "my bicycle"): "There are racks for bicycles behind the shop.",
    ("order", "buy", "a gift voucher"): "Vouchers are on the last page of our web shop, from ten euros.",
    ("ship", "deliver", "abroad"): "We ship to all of Europe; it takes five days.",
    ("wash", "clean", "wool"): "Wash wool at thirty degrees and let it dry lying flat.",
    ("join", "sign up for", "the newsletter"): "Leave your e-mail at the bottom of our page.",
    ("complain", "report a fault", "about a shoe"): "We are sorry. Send us an image and we answer the same day.",
    ("work", "apply", "as a trainee"): "Applications go to jobs at our address, with a short letter.",
    ("rent", "borrow", "a tent"): "Tents are rented out by the week, for thirty euros.",
    ("measure", "find", "my size"): "The table of sizes is under every image; measure around the chest.",
    ("save", "get a discount on", "old models"): "Last year's models are half the price in the cellar.",
    ("invoice", "get a bill for", "my company"): "Tell us the company's name and we mail the invoice as PDF.",
    ("recycle", "get rid of", "old boots"): "Put them into the green box at the door; a charity fetches them.",
}
NEVER = {  # what the shop was never asked before; val and test have others
    "val": [("teach", "learn", "Spanish"), ("sell", "trade", "my car"), ("paint", "draw", "the ceiling"),
            ("win", "play", "the lottery"), ("grow", "plant", "tomatoes"), ("fly", "book a flight", "to Mars"),
            ("cook", "fry", "an egg"), ("vote", "choose", "a mayor")],
    "test": [("sing", "hum", "a lullaby"), ("build", "raise", "a bridge"), ("catch", "hunt", "a tiger"),
             ("bake", "make", "a wedding cake"), ("dive", "swim", "with sharks"), ("mend", "tune", "a piano"),
             ("climb", "ski down", "Everest"), ("hire", "marry", "a prince"), ("feed", "milk", "the cows"),
             ("solve", "study", "an equation")],
}  # fmt: skip
FRAMES = {
    "train": ["How can I {v} {o}?", "Where do I {v} {o}?", "I want to {v} {o}.", "Can you help me to {v} {o}?",
              "Is it possible to {v} {o}?", "What must I do to {v} {o}?", "hello, how do i {v} {o}", "{v} {o}?",
              "Please explain how one can {v} {o}.", "We need to {v} {o}, how?", "My wife wants to {v} {o}."],
    "val": ["I would like to {v} {o}, please.", "Do you know how I can {v} {o}?", "Somebody told me I could {v} {o}."],
    "test": ["Good morning, is there a way to {v} {o}?", "A question: when can I {v} {o}?", "so i need to {v} {o} soon",
             "Could I {v} {o} with you?"],
}  # fmt: skip


def pairs() -> Iterator[dict[str, str]]:
    for (first, second, thing), reply in TOPICS.items():
        for split, frames in FRAMES.items():
            for frame, verb in product(frames, (first, second)):
                yield {"question": frame.format(v=verb, o=thing), "reply": reply, "split": split}
    for split, topics in NEVER.items():
        for (first, second, thing), frame in product(topics, FRAMES[split]):
            for verb in (first, second):
                yield {"question": frame.format(v=verb, o=thing), "reply": "", "split": split}


# --- intents and feelings in writing ----------------------------------------------------------------------------

INTENTS = {
    "weather": ["rain", "snow", "wind", "sun"],
    "alarm": ["wake me", "set an alarm", "get me up", "ring the bell"],
    "music": ["play some jazz", "put on a song", "start the radio", "turn up the music"],
    "light": ["switch the lamp on", "dim the lights", "make it brighter", "turn the lamp off"],
    "heating": ["warm up the room", "turn the heater on", "make it cooler", "lower the temperature"],
    "shopping": ["buy milk", "add bread to the list", "order some eggs", "get more coffee"],
    "call": ["phone my mother", "call the doctor", "ring up Peter", "dial the office"],
    "timer": ["count down ten minutes", "start a timer", "time my egg", "stop the countdown"],
}
ASKING = {
    "train": ["{x}", "please {x}", "can you {x}", "{x} now", "I want you to {x}", "could you {x} for me", "hey, {x}",
              "will you {x} please", "{x}, will you", "it is time to {x}", "I need you to {x}"],
    "val": ["would you mind, {x}", "do {x} for us"],
    "test": ["be so kind and {x}", "let us {x} tonight", "okay then {x} quickly", "would it be possible to {x}"],
}  # fmt: skip
WEATHER = {
    "train": ["will there be {x}", "is there {x} today", "any {x} tomorrow", "how much {x} do we get", "{x} tonight",
              "do you expect {x}", "is {x} coming", "what about the {x}", "does it look like {x}", "{x} this week",
              "tell me about the {x}"],
    "val": ["should I count on {x}", "so is it {x} again"],
    "test": ["what are the chances of {x}", "can we hope for {x} on Monday", "did they announce {x}",
             "how likely is {x} now"],
}  # fmt: skip
FEELINGS = {
    "joy": ["glad", "happy", "delighted", "cheerful", "merry"],
    "sadness": ["sad", "unhappy", "lonely", "gloomy", "miserable"],
    "anger": ["angry", "furious", "cross", "outraged", "mad"],
    "fear": ["afraid", "scared", "frightened", "worried", "nervous"],
    "surprise": ["surprised", "amazed", "astonished", "stunned", "startled"],
}
CAUSES = ["the letter", "our team", "this film", "the news", "my brother", "the test", "that noise", "the party"]
FELT = {
    "train": ["I am {x} about {c}.", "{c} makes me {x}.", "So {x} today because of {c}.",
              "I feel {x} when I think of {c}.",
              "We were all {x} after {c}.", "She was {x} about {c}.", "Why am I so {x} about {c}?",
              "He got {x} over {c}."],
    "val": ["Rather {x}, and all due to {c}.", "They looked {x} at {c}."],
    "test": ["Nobody was as {x} as I was at {c}.", "It left us {x}, {c} did.", "To be honest, {c} had me {x}."],
}  # fmt: skip


def intents() -> Iterator[dict[str, str]]:
    for intent, wishes in INTENTS.items():
        for split, frames in (WEATHER if intent == "weather" else ASKING).items():
            for frame, wish in product(frames, wishes):
                yield {"said": frame.format(x=wish), "intent": intent, "split": split}


def feelings() -> Iterator[dict[str, str]]:
    draw = random.Random(SEED + 2)
    for feeling, words in FEELINGS.items():
        for split, frames in FELT.items():
            for frame, word in product(frames, words):
                for cause in draw.sample(CAUSES, 3):
                    text = frame.format(x=word, c=cause)
                    yield {"said": text[0].upper() + text[1:], "feeling": feeling, "split": split}


# --- emotions in voices -----------------------------------------------------------------------------------------

SPOKEN = {
    "train": ["The train is here.", "I have your keys.", "It is on the table.", "They came home.",
              "This is the last one.",
              "We go on Friday."],
    "val": ["The door is open.", "Take the other one."],
    "test": ["She called again.", "It was the green one.", "You said so before."],
}  # fmt: skip
AUDIO = {  # emotion -> (words a minute, pitch around the middle of a voice, spread of the pitch, how sentences end)
    "calm": (150, 0, 40, "."),
    "joy": (205, 24, 100, "!"),
    "sadness": (95, -18, 10, "."),
    "anger": (300, -20, 80, "!"),
    "fear": (290, 40, 5, "."),
}
VOICES = {"train": 66, "val": 8, "test": 14}
TAKES = 4  # sentences of each voice and emotion
ACCENTS = ["en-us", "en", "en-gb-x-rp", "en-gb-scotland"]
RATE = 8000


def emotions(folder: Path) -> Iterator[dict[str, str]]:
    speech = Speech()
    draw = random.Random(SEED + 3)
    variants = speech.variants()
    draw.shuffle(variants)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for split, count in VOICES.items():
        mine, variants = variants[:count], variants[count:]
        for variant, (emotion, (speed, pitch, spread, end)) in product(mine, AUDIO.items()):
            middle = 36 + hash_of(variant) % 11
            for n, sentence in enumerate(draw.sample(SPOKEN[split], min(TAKES, len(SPOKEN[split])))):
                rate = round(speed * draw.uniform(0.93, 1.07))
                high = min(max(middle + pitch + draw.randint(-3, 3), 0), 99)
                voice = f"{draw.choice(ACCENTS)}+{variant}"
                wave = speech.speak(sentence[:-1] + end, voice, rate, high, min(spread + draw.randint(-5, 5), 100))
                if len(wave) < speech.rate // 5:
                    continue  # some variants whisper below what can be heard
                name = f"audio/{variant.replace(' ', '_')}-{emotion}-{n}.wav"
                (folder / name).write_bytes(encode_wav(resample(wave, speech.rate, RATE), RATE))
                yield {"audio_file_name": name, "emotion": emotion, "split": split}


# --- files ------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    folder = Path(sys.argv[1])
    write_csv(folder / "facts" / "facts.csv", list(statements()))
    write_jsonl(folder / "chat" / "chats.jsonl", list(conversations()))
    write_csv(folder / "replies" / "pairs.csv", list(pairs()))
    write_csv(folder / "intents" / "intents.csv", list(intents()))
    write_csv(folder / "feelings" / "feelings.csv", list(feelings()))
    (folder / "emotions").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "emotions" / "metadata.jsonl", [dict(row) for row in emotions(folder / "emotions")])


if __name__ == "__main__":
    main()
