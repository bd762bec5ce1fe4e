"""Texts for tasks: sentences of the pretraining text, and generated ones that need no text at hand."""

import lzma
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from random import Random

from dspy_lora.errors import DataError
from dspy_lora.seedling.task import pick
from dspy_lora.seedling.words import DAYS, Split, common_words, is_held_out, names, word

_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
_SHORTEST, _LONGEST = 30, 400  # characters of a usable sentence
_WORD = re.compile(r"[a-z]+")
_INDEXED, _PLACES = 200_000, 60  # sentences that are indexed by their words, and how many are kept for a word

_FRAMES = (
    "{first} asked about the {a} before {day}.",
    "We could not find the {a} near the {b} in {city}.",
    "The {a} was delivered with a {b} and nothing else.",
    "Please tell {first} that the {a} is ready.",
    "After the {a}, {first} and {first2} went to {city}.",
    "I would like to know more about your {a} and the {b}.",
    "There were {n} reports about the {a} on {day}.",
    "My {a} stopped working when the {b} arrived.",
    "{first} {last} wrote that the {a} needs another look.",
    "Nobody in {city} remembers who brought the {a}.",
    "The team talked about {a} for {n} minutes.",
    "It seems that the {a} and the {b} were mixed up.",
    "Can you send me the {a} by {day}?",
    "{city} is known for its {a}, {first} said.",
    "On {day} we paid {n} for the {a}.",
    "They moved the {a} behind the {b} without asking.",
    "I have been waiting for the {a} since {day}.",
    "{first} thinks that a {a} is better than a {b}.",
    "Our {a} costs {n} this month, which surprised {first}.",
    "The letter from {city} mentions a {a}.",
    "There is a problem with the {a}.",
    "What happened to the {a} in {city}?",
    "She asked for {a} and got {b} instead.",
    "He wrote a note on {a} for {first}.",
    "All of it depends on the {a}.",
    "We talked about {a}, then about {b}.",
    "Is there any news on the {a}?",
    "Nobody expected the {a} on {day}.",
    "I was told that {a} comes first.",
    "Please look at the {a} today, {first}.",
    "{first} could not say how the {a} works.",
    "The report covers {a} in detail.",
    "How do I change the {a}?",
    "It came with a {a} that {first} never used.",
    "Why is the {a} still missing after {n} days?",
    "Every {a} needs a {b}, as {first} {last} knows.",
    "My question is about {a}.",
    "They said the {a} would take {n} days.",
    "In {city} the {a} is free on {day}.",
    "The {a} arrived broken.",
)


def generated(rng: Random, split: Split, about: str = "") -> str:
    """A sentence about common words, names and places, or about a given word."""
    first, first2 = rng.sample(names("first", split), 2) if len(names("first", split)) > 1 else ("Ada", "Ben")
    return pick(rng, _FRAMES, split).format(
        first=first,
        first2=first2,
        last=rng.choice(names("last", split)),
        city=rng.choice(names("city", split)),
        day=rng.choice(DAYS),
        n=rng.randint(2, 999),
        a=about or word(rng, split, 0.1),
        b=word(rng, split, 0.1),
    )


def read_texts(folder: Path) -> list[str]:
    """The pretraining texts, one string a file (``*.txt.xz`` or ``*.txt``).

    Raises:
        DataError: The folder holds none.
    """
    files = sorted(folder.glob("*.txt*"))
    if not files:
        raise DataError(f"{folder} holds no *.txt.xz and no *.txt: name the folder of the texts to train on")
    return [
        (lzma.open(file, "rt", encoding="utf-8").read() if file.suffix == ".xz" else file.read_text()) for file in files
    ]


def split_sentences(text: str) -> list[str]:
    """Sentences of moderate length in a text."""
    return [s for line in text.split("\n") for s in _END.split(line.strip()) if _SHORTEST <= len(s) <= _LONGEST]


class Texts:
    """Where tasks take their texts from.

    Args:
        sentences: Sentences of the pretraining text in their order; empty where only generated ones are wanted.
        passages: ``(subject, passage)`` pairs of textbooks, for tasks about topics.
    """

    def __init__(self, sentences: list[str] | None = None, passages: list[tuple[str, str]] | None = None) -> None:
        self.sentences = sentences or []
        self.passages = passages or []

    def sentence(self, rng: Random, split: Split) -> str:
        """One sentence."""
        if not self.sentences or rng.random() < 0.35:
            return generated(rng, split)
        return rng.choice(self.sentences)

    def text(self, rng: Random, split: Split) -> str:
        """One to eight sentences, mostly few; now and then a passage."""
        if self.passages and rng.random() < 0.08:
            return rng.choice(self.passages)[1]
        return " ".join(self.sentence(rng, split) for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 4, 8))))

    def natural(self, split: Split) -> tuple[str, ...]:
        """Common words that some sentences hold."""
        return self._natural[split]

    def holding(self, rng: Random, phrase: str) -> str | None:
        """A sentence that holds a word by nature; None where none is known."""
        places = self._by_word.get(phrase)
        return self.sentences[rng.choice(places)] if places else None

    @cached_property
    def _by_word(self) -> dict[str, list[int]]:
        """Places of sentences by common word, a few a word, from an even sample."""
        common = {*common_words("train"), *common_words("heldout")}
        index: dict[str, list[int]] = defaultdict(list)
        for place in range(0, len(self.sentences), max(1, len(self.sentences) // _INDEXED)):
            for found in set(_WORD.findall(self.sentences[place].lower())) & common:
                if len(index[found]) < _PLACES:
                    index[found].append(place)
        return dict(index)

    @cached_property
    def _natural(self) -> dict[Split, tuple[str, ...]]:
        usual = [w for w, places in self._by_word.items() if len(places) >= 5 and len(w) > 3]
        return {
            "train": tuple(w for w in usual if not is_held_out(w)),
            "heldout": tuple(w for w in usual if is_held_out(w)),
        }

    def neighbours(self, rng: Random, split: Split, count: int) -> list[str]:
        """``count`` sentences that follow each other (generated ones do not).

        Where there are more, the last sentence is never among them: so the shipped model's tasks were drawn.

        Raises:
            DataError: The texts have fewer sentences.
        """
        if not self.sentences:
            return [generated(rng, split) for _ in range(count)]
        if len(self.sentences) < count:
            raise DataError(
                f"the texts have {len(self.sentences)} sentences of {_SHORTEST} to {_LONGEST} characters, and a task "
                f"needs {count} that follow each other: give longer texts, or none"
            )
        start = rng.randrange(max(1, len(self.sentences) - count))
        return self.sentences[start : start + count]


class _FewWords(Texts):
    """Texts of two to eight words without order: what a rule asks for is easy to find in them."""

    def text(self, rng: Random, split: Split) -> str:
        return " ".join(word(rng, split) for _ in range(rng.randint(2, 8)))


FEW_WORDS = _FewWords()

_BOOK = re.compile(
    r"(?m)^(?:Customization\n)?([A-Z][A-Za-z ,:&'-]{4,48}?)(?: \d?e)? is licensed under a Creative Commons"
)


def textbook_passages(text: str) -> list[tuple[str, str]]:
    """``(subject, passage)`` pairs: a passage is a line of 150 to 700 characters of the book that names the subject."""
    marks = [(match.start(), match[1].strip()) for match in _BOOK.finditer(text)]
    pairs: list[tuple[str, str]] = []
    for (start, subject), (end, _) in zip(marks, [*marks[1:], (len(text), "")], strict=False):
        subject = re.sub(
            r"^(Introduction to|Introductory|College|Principles of|Concepts of|\W)\s+", "", subject
        ).lower()
        pairs += [(subject, line) for line in text[start:end].split("\n") if 150 <= len(line) <= 700]
    return pairs
