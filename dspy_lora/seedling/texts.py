"""Natural sentences for the generated tasks: a pool, and an index from a word to the sentences that hold it."""

import lzma
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random

from dspy_lora.seedling.words import Split, common_words

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z“\"])")
_WORD = re.compile(r"[a-z]+")

#: One sentence in fifty is kept from training; ``sentences.txt`` ships a sample of those.
HELD_OUT_ONE_IN = 50


def sentence_held_out(sentence: str) -> bool:
    """Whether the sentence belongs to the held-out side."""
    return zlib.crc32(sentence.encode()) % HELD_OUT_ONE_IN == 0


def read_text(path: Path) -> str:
    """A text file, packed with xz or not."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as stream:
            return stream.read()
    return path.read_text(encoding="utf-8")


def split_sentences(text: str) -> Iterable[str]:
    """The plain sentences of a text: 5 to 40 words, 25 to 240 characters, one line each."""
    for line in text.splitlines():
        for sentence in _SENTENCE_END.split(line.strip()):
            if 25 <= len(sentence) <= 240 and 5 <= sentence.count(" ") + 1 <= 40 and sentence[-1] in ".!?”\"":
                yield sentence


class SentencePool:
    """Sentences of one side of the split, with an index by lower-case word.

    Args:
        sentences: The sentences to draw from.
        per_word: How many sentences to remember for one word.
    """

    def __init__(self, sentences: list[str], per_word: int = 60):
        self.sentences = sentences
        self.by_word: dict[str, list[int]] = defaultdict(list)
        for number, sentence in enumerate(sentences):
            for word in set(_WORD.findall(sentence.lower())):
                if len(self.by_word[word]) < per_word:
                    self.by_word[word].append(number)
        self._frequent: dict[Split, tuple[str, ...]] = {}

    def draw(self, rng: Random, avoid: Iterable[str] = (), count: int = 1) -> str:
        """``count`` random sentences joined by spaces, none containing a word of ``avoid`` as a substring."""
        avoid = [word.lower() for word in avoid]
        found: list[str] = []
        while len(found) < count:
            sentence = rng.choice(self.sentences)
            lower = sentence.lower()
            if not any(word in lower for word in avoid):
                found.append(sentence)
        return " ".join(found)

    def holding(self, rng: Random, word: str, avoid: Iterable[str] = ()) -> str | None:
        """A sentence that holds ``word`` as a whole word and nothing of ``avoid``; None if there is none."""
        numbers = self.by_word.get(word.lower())
        for _ in range(4 if numbers else 0):
            sentence = self.sentences[rng.choice(numbers)]  # type: ignore[arg-type]
            lower = sentence.lower()
            if not any(other.lower() in lower for other in avoid):
                return sentence
        return None

    def frequent(self, split: Split, at_least: int = 4) -> tuple[str, ...]:
        """The common words of a split that enough sentences hold: keywords that occur by nature."""
        if split not in self._frequent:
            words = [w for w in common_words(split) if len(w) > 3 and len(self.by_word.get(w, ())) >= at_least]
            self._frequent[split] = tuple(words)
        return self._frequent[split]


@cache
def shipped_pool() -> SentencePool:
    """The held-out sentences that ship with the package (``sentences.txt``)."""
    lines = (Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()
    return SentencePool(lines)


def training_pool(folder: Path, limit: int = 300_000, seed: int = 0) -> SentencePool:
    """A pool from the ``*.txt`` and ``*.txt.xz`` files of a folder, without the held-out sentences.

    Args:
        folder: The pretraining text.
        limit: At most this many sentences, drawn at random.
        seed: Of that draw.
    """
    sentences: list[str] = []
    for path in sorted(folder.glob("*.txt*")):
        sentences += [s for s in split_sentences(read_text(path)) if not sentence_held_out(s)]
    Random(seed).shuffle(sentences)
    return SentencePool(sentences[:limit])
