"""Where context comes from: a source has a name, a rank, and gives the items that it has for a query."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import dspy

from dspy_lora.errors import ConfigError

if TYPE_CHECKING:
    from dspy_lora.context.playbook import Playbook

_NAME = re.compile(r"[\w.-]+")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Item:
    """A piece of context, used whole or not at all.

    Attributes:
        text: What it says.
        identity: What it is called in its source (a bullet's id, a passage's number in the corpus); where it is empty,
            its place among the source's items, from 1.
    """

    text: str
    identity: str = ""


class Source:
    """A source of context.

    Args:
        name: Its name in provenance marks: letters, digits, ``_``, ``-``, ``.``.
        get: Called with the query, gives strings or Items, the most wanted first. It runs in a thread of its own, with
            the caller's ``dspy.context``, perhaps in several at once. None, another type or an exception is a failure:
            the source is left out as a whole.
        priority: Sources of larger numbers get room first; among equals the one listed first.
        share: The largest part of the budget that it may take, in (0, 1]. What it leaves goes to the others.

    Raises:
        ConfigError: A name or a share that is not allowed, or a ``get`` that cannot be called.
    """

    # Whether its items come last one first: the text turns them round, and the first that does not fit ends the source,
    # so that what is kept has no hole.
    backwards: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        get: Callable[[str], Iterable[str | Item]],
        *,
        priority: float = 0,
        share: float = 1.0,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"source {name!r}: a name consists of letters, digits, '_', '-' and '.'.")
        if not callable(get):
            raise ConfigError(f"source {name!r}: {get!r} cannot be called. Give a function from a query to texts.")
        if not 0 < share <= 1:
            raise ConfigError(
                f"source {name!r}: share={share!r} is no part of the budget. Give one above 0, at most 1."
            )
        self.name = name
        self.get = get
        self.priority = priority
        self.share = share

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, priority={self.priority}, share={self.share})"

    def items(self, query: str) -> Iterator[Item]:
        """What it has for a query; blank texts are nothing, every item has an identity.

        Raises:
            TypeError: It gave something else than texts.
        """
        given = self.get(query)
        for number, entry in enumerate([given] if isinstance(given, str | Item) else given, 1):
            item = Item(entry) if isinstance(entry, str) else entry
            if not isinstance(item, Item):
                raise TypeError(f"source {self.name!r} gave {entry!r}. Give strings or Items.")
            # A lone surrogate is no text to a tokenizer, nor to an engine.
            text = item.text.encode(errors="replace").decode().strip()
            if text:
                yield Item(text, " ".join(item.identity.split()) or str(number))


class Bullets(Source):
    """The bullets of a playbook, by their ids; those of the greatest worth (helpful minus harmful) first.

    Args:
        playbook: It is read at every call.
        name: See Source.
        priority: See Source.
        share: See Source.
    """

    def __init__(
        self, playbook: "Playbook", *, name: str = "playbook", priority: float = 0, share: float = 1.0
    ) -> None:
        super().__init__(name, partial(_bullets, playbook), priority=priority, share=share)


class Passages(Source):
    """Retrieved passages, best first.

    Args:
        retriever: ``dspy.Retrieve(k=5)``, ``dspy.retrievers.Embeddings``, ``dspy.ColBERTv2`` or any callable from a
            query to strings, to Items, to mappings with ``long_text`` (and ``pid``, which becomes the identity), or to
            Predictions with ``passages`` (and ``indices``, which become the identities).
        name: See Source.
        priority: See Source.
        share: See Source.
    """

    def __init__(
        self, retriever: Callable[[str], Any], *, name: str = "passages", priority: float = 0, share: float = 1.0
    ) -> None:
        if not callable(retriever):
            raise ConfigError(f"source {name!r}: retriever {retriever!r} cannot be called. Give dspy.Retrieve(k=5).")
        super().__init__(name, partial(_retrieve, retriever), priority=priority, share=share)


class Glossary(Source):
    """The entries whose term occurs in the query, longest term first.

    A term occurs where its words stand in the query in one run, in any case and Unicode form: "interest rate" occurs in
    "What INTEREST RATE applies?", but not in "Which interest rates?" nor in "an interest-free rate". Words are runs of
    letters and digits; every other mark counts as a word.

    Args:
        terms: Meaning by term. It is copied.
        name: See Source.
        priority: See Source.
        share: See Source.

    Raises:
        ConfigError: A term without a letter, digit or mark.
    """

    def __init__(
        self, terms: Mapping[str, str], *, name: str = "glossary", priority: float = 0, share: float = 1.0
    ) -> None:
        entries: dict[tuple[str, ...], list[Item]] = {}
        for term in sorted(terms, key=lambda term: (-len(term), term)):
            if not _words(term):
                raise ConfigError(f"glossary {name!r}: the term {term!r} is blank. Leave it out.")
            entries.setdefault(_words(term), []).append(Item(f"{term}: {terms[term]}", term))
        super().__init__(name, partial(_look_up, entries), priority=priority, share=share)


class History(Source):
    """The conversation so far: the newest turns that fit, without a hole, in the text from old to new.

    Which conversation it is, each call of the assembler says; without one it is empty. A turn's identity is its place
    in the whole conversation, from 1.

    Args:
        last: Offer at most this many turns; None offers all.
        name: See Source.
        priority: See Source.
        share: See Source.

    Raises:
        ConfigError: ``last`` is below 1.
    """

    backwards: ClassVar[bool] = True

    def __init__(
        self, *, last: int | None = None, name: str = "history", priority: float = 0, share: float = 1.0
    ) -> None:
        if last is not None and last < 1:
            raise ConfigError(
                f"source {name!r}: last={last!r} turns are none. Give 1 or more, or leave the source out."
            )
        super().__init__(name, partial(_turns, (), last), priority=priority, share=share)
        self.last = last

    def of(self, history: "dspy.History | Sequence[Mapping[str, Any]]") -> "History":
        """The same source with a conversation.

        Args:
            history: A ``dspy.History``, or messages: mappings from a signature's fields to values, or with ``role``
                and ``content``. Each message is one turn.
        """
        bound = History(last=self.last, name=self.name, priority=self.priority, share=self.share)
        bound.get = partial(_turns, history, self.last)
        return bound


def _bullets(playbook: "Playbook", query: str) -> list[Item]:
    return [Item(bullet.text, bullet.id) for bullet in sorted(playbook.bullets, key=lambda bullet: -bullet.worth)]


def _retrieve(retriever: Callable[[str], Any], query: str) -> Iterator[str | Item]:
    yield from _passages(retriever(query))


def _passages(found: Any) -> Iterator[str | Item]:
    if isinstance(found, str | Item):
        yield found
    elif isinstance(found, Mapping):
        yield Item(found["long_text"], str(found.get("pid", "")))
    elif isinstance(found, dspy.Example):
        indices = found.get("indices")
        if indices is None:
            yield from _passages(found.passages)
        else:
            yield from (Item(text, str(index)) for text, index in zip(found.passages, indices, strict=True))
    else:
        for each in found:
            yield from _passages(each)


def _look_up(entries: Mapping[tuple[str, ...], list[Item]], query: str) -> list[Item]:
    words = _words(query)
    longest = max(map(len, entries), default=0)
    runs = {words[i:j] for i in range(len(words)) for j in range(i + 1, min(i + longest, len(words)) + 1)}
    found = [item for run in runs for item in entries.get(run, ())]
    return sorted(found, key=lambda item: (-len(item.identity), item.identity))


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _turns(history: "dspy.History | Sequence[Mapping[str, Any]]", last: int | None, query: str) -> Iterator[Item]:
    messages = history.messages if isinstance(history, dspy.History) else history
    for number in range(len(messages), max(0, len(messages) - (last or len(messages))), -1):
        message = messages[number - 1]
        pairs = [(message["role"], message["content"])] if message.keys() == {"role", "content"} else message.items()
        yield Item("\n".join(f"{key}: {value}" for key, value in pairs), str(number))
