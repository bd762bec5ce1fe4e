"""The items of a playbook: one line each, with what it was good for."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Embed = Callable[[list[str]], Any]  # texts to vectors, [texts, dimensions]

# Marks at the end of a sentence or of a part of one, not those of "0.5", "a != b" and "split at `,`"; quotes at a word.
_MARKS = re.compile(r"(?<=\S)[.,;:!?\u2026\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]+(?=[\s)\]]|$)")
_QUOTE = "[\"'`\u00ab\u00b4\u00bb\u2018-\u201f\u2039\u203a]"
_QUOTES = re.compile(rf"(?<=\w){_QUOTE}|{_QUOTE}(?=\w)")
_PART = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Bullet:
    """One item of a playbook.

    Attributes:
        id: Made from its first section and text; it stays when the text changes.
        section: Where it belongs.
        text: One line.
        helpful: How often it was seen to help.
        harmful: How often it was seen to mislead.
        removed: Whether it was taken out of the prompt.
    """

    id: str
    section: str
    text: str
    helpful: int = 0
    harmful: int = 0
    removed: bool = False

    @property
    def worth(self) -> int:
        """Helpful minus harmful."""
        return self.helpful - self.harmful

    def line(self) -> str:
        """The bullet as the file has it."""
        return f"- [{self.id}] helpful={self.helpful} harmful={self.harmful} :: {self.text}"


def bullet_id(section: str, text: str) -> str:
    """The id of a new bullet: the section's letters and 40 bits of a hash of both."""
    slug = "-".join(re.findall(r"[a-z0-9]+", section.lower())[-3:]) or "bullet"
    digest = hashlib.sha256("\n".join((section, text)).encode()).hexdigest()
    return f"{slug}-{digest[:10]}"


def place(bullet: Bullet) -> tuple[str, str, str]:
    """Where a bullet stands among others: by section and text."""
    return bullet.section, bullet.text, bullet.id


def by_section(bullets: Iterable[Bullet]) -> Iterator[tuple[str, list[Bullet]]]:
    """Each section with its bullets, in their order."""
    found: dict[str, list[Bullet]] = {}
    for bullet in bullets:
        found.setdefault(bullet.section, []).append(bullet)
    yield from found.items()


def _plain(text: str) -> str:
    """A text without case, quotes, sentence marks and blanks. Other marks stay: "C" and "C++", "-5" and "+5" differ."""
    return " ".join(_PART.findall(_MARKS.sub(" ", _QUOTES.sub("", text.casefold()))))


def alike(bullets: Sequence[Bullet], embed: Embed | None, threshold: float) -> list[list[Bullet]]:
    """Bullets that say the same as the first of their group."""
    if embed is None:
        same: dict[str, list[Bullet]] = {}
        for bullet in bullets:
            same.setdefault(_plain(bullet.text) or bullet.text, []).append(bullet)
        return list(same.values())
    vectors = np.asarray(embed([bullet.text for bullet in bullets]), dtype=float)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    groups: list[list[int]] = []
    for number, vector in enumerate(vectors):
        near_one = next((group for group in groups if vectors[group[0]] @ vector >= threshold), None)
        if near_one is None:
            groups.append([number])
        else:
            near_one.append(number)
    return [[bullets[number] for number in group] for group in groups]
