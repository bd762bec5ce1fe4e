"""Which items get the room there is, each whole or not at all."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dspy_lora.context.sources import Item, Source
from dspy_lora.context.tokens import CountTokens

# Where a sentence ends. The end marks of Chinese and Japanese are followed by no blank.
_SENTENCE_END = re.compile(r"(?<=[.!?]) |(?<=[。！？]) ?")  # noqa: RUF001 - full-width marks are meant
_LIST_MARK = re.compile(r"^[-*•]\s+")
_END_MARKS = ".!。！"  # noqa: RUF001 - not "?": a question says something else than the sentence

_ROUNDING = 1e-9  # tokens; 100 * 0.29 is less than 29

Why = Literal["duplicate", "budget", "share", "failed", "slow"]


@dataclass(frozen=True)
class Placed:
    """An item in the text.

    Attributes:
        source: Its source's name.
        identity: What it is called there.
        text: What it says, without its mark.
        tokens: Tokens of its lines in the text, mark included, and line end for all but the first that was taken.
    """

    source: str
    identity: str
    text: str
    tokens: int


@dataclass(frozen=True)
class LeftOut:
    """An item, or a whole source, that is not in the text.

    Attributes:
        source: The source's name.
        identity: The item; empty where the source as a whole is left out.
        why: ``duplicate`` (said already by an item in the text), ``budget`` or ``share`` (no room, in all or of its
            source), ``failed`` or ``slow`` (the source).
        detail: The same for a reader.
        text: What the item says.
    """

    source: str
    identity: str
    why: Why
    detail: str
    text: str = ""


class Selection:
    """Items chosen one after the other, first come, first served.

    An item offered is taken where it is no duplicate and fits in what is left; nothing taken is given up again for a
    later one. So what a source gets depends on the sources before it alone.

    Args:
        budget: Tokens.
        count_tokens: Counts them.
        near: See ``ContextAssembler``.
        mark: See ``ContextAssembler``.
    """

    def __init__(self, budget: int, count_tokens: CountTokens, near: float, mark: str) -> None:
        self.left_out: list[LeftOut] = []
        self._budget = budget
        self._count = count_tokens
        self._near = near
        self._mark = mark
        self._taken: list[tuple[Placed, frozenset[str]]] = []
        self._room = budget

    def offer(self, source: Source, items: list[Item]) -> None:
        """Takes of a source's items what fits."""
        room = math.floor(self._budget * source.share + _ROUNDING)
        full: LeftOut | None = None
        for item in items:
            if full is not None:
                detail = f"{full.identity}, which comes after it, did not fit"
                self.left_out.append(LeftOut(source.name, item.identity, full.why, detail, item.text))
                continue
            result = self._weigh(source, item, room)
            if isinstance(result, LeftOut):
                self.left_out.append(result)
                full = result if source.backwards and result.why != "duplicate" else None
            else:
                room -= result.tokens
                self._room -= result.tokens

    def finish(self, order: Callable[[list[Placed]], list[Placed]]) -> tuple[str, list[Placed]]:
        """Writes the text.

        The tokens of lines may add up to less than those of the whole with a tokenizer that does not split at line
        ends. Then the items taken last are left out again until the whole fits.

        Args:
            order: Puts items from the order in which they were taken into the order of reading.

        Returns:
            The text, at most ``budget`` tokens, and its items in the order of reading.
        """
        while True:
            placed = order([placed for placed, _ in self._taken])
            text = "\n".join(self._lines(each.source, each.identity, each.text) for each in placed)
            if not placed or (tokens := self._count(text)) <= self._budget:
                return text, placed
            last, _ = self._taken.pop()
            detail = f"with it the text has {tokens} tokens of {self._budget}"
            self.left_out.append(LeftOut(last.source, last.identity, "budget", detail, last.text))

    def _weigh(self, source: Source, item: Item, room: int) -> Placed | LeftOut:
        """Takes an item, or says why not."""
        said = sentences(item.text)
        for other, others in self._taken:
            if containment(said, others) >= self._near:
                detail = f"{other.source}:{other.identity} says it already"
                return LeftOut(source.name, item.identity, "duplicate", detail, item.text)
        lines = self._lines(source.name, item.identity, item.text)
        tokens = self._count(lines + "\n" if self._taken else lines)  # the text has one line end less than items
        if tokens > min(room, self._room):
            why: Why = "budget" if tokens > self._room else "share"
            left = self._room if why == "budget" else room
            detail = f"{tokens} tokens, {left} left of the {why}"
            return LeftOut(source.name, item.identity, why, detail, item.text)
        placed = Placed(source.name, item.identity, item.text, tokens)
        self._taken.append((placed, said))
        return placed

    def _lines(self, source: str, identity: str, text: str) -> str:
        """An item with its mark. Its further lines are indented: no item can write a mark of another source."""
        return self._mark.format(source=source, identity=identity) + "\n  ".join(text.splitlines())


def sentences(text: str) -> frozenset[str]:
    """What a text (not a blank one) says: its sentences, without case, blanks, line ends, list marks and full stops."""
    plain = " ".join(text.casefold().split())
    found = {_LIST_MARK.sub("", part).rstrip(_END_MARKS) for part in _SENTENCE_END.split(plain)}
    return frozenset(found - {""} or {plain})


def containment(said: frozenset[str], other: frozenset[str]) -> float:
    """The part of a text's sentences, by characters, that another text has too, 0 to 1.

    Sentences and not shingles: two clauses that differ in a number, a "not" or a party share nearly all of their
    shingles and say different things.
    """
    return sum(map(len, said & other)) / sum(map(len, said))
