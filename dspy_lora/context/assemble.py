"""Context from several sources under a token budget."""

import asyncio
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import dspy

from dspy_lora.context.selection import LeftOut, Placed, Selection
from dspy_lora.context.sources import History, Item, Source
from dspy_lora.context.tokens import CountTokens, estimate_tokens
from dspy_lora.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Items of one source that are read for one query: bounds the memory of a source that never stops.
MOST_ITEMS = 10_000

# Calls of one source that may be overdue at once. While there are so many, it is not asked, so that a source that never
# returns does not cost a thread at every query.
MOST_OVERDUE = 8


@dataclass(frozen=True)
class Assembled:
    """Context for one query.

    Attributes:
        text: The items, each on lines of its own after its mark; ``""`` where there are none.
        tokens: Tokens of ``text``, at most ``budget``.
        budget: Tokens that were allowed.
        items: What ``text`` holds, in its order.
        left_out: What it does not hold, and why; no item is in neither.
    """

    text: str
    tokens: int
    budget: int
    items: tuple[Placed, ...]
    left_out: tuple[LeftOut, ...]

    def __str__(self) -> str:
        return self.text

    def summary(self) -> str:
        """One sentence: how many items of which sources are in it, and what was left out for which reason."""
        counts = Counter(each.source for each in self.items)
        taken = ", ".join(f"{count} of {source}" for source, count in counts.items()) or "nothing"
        gone = Counter((each.source, each.why) for each in self.left_out)
        left = "; ".join(f"{count} of {source} left out ({why})" for (source, why), count in gone.items())
        return f"{taken}; {left}" if left else taken

    @property
    def failures(self) -> tuple[LeftOut, ...]:
        """The sources that gave nothing because they failed or were slow."""
        return tuple(each for each in self.left_out if each.why in ("failed", "slow"))


class ContextAssembler:
    """Puts together what several sources have for a query, as much as a token budget holds.

        assembler = ContextAssembler(
            [
                Bullets(playbook, priority=3),
                Glossary({"force majeure": "an event beyond a party's control"}, priority=2),
                Passages(dspy.Retrieve(k=5), priority=1, share=0.6),
                History(last=6),
            ],
            budget=1024,
            count_tokens=count_tokens_of(lm),
        )
        context = assembler("Is this force majeure?", history=history)

    All sources are asked side by side. Then they are served one after the other, larger priorities first: of each, item
    by item, whatever is no duplicate of an item taken before and fits in what is left of the budget and of the source's
    share; a smaller item may fit after one that did not. Nothing that is taken makes room for a later one. The text
    lists the sources in the order in which they were given here.

    A source that fails, or has not given its last item when the time is up, is left out as a whole and reported in
    ``left_out`` and in the log; the others get its room. Where all fail, the text is empty: assembling never raises on
    a source's account. It waits ``timeout`` at most for a source that hangs, whose thread keeps no process from ending.

    It keeps nothing between calls, is safe from many threads, and a deep copy is the same object.

    Args:
        sources: Where the context comes from, in the order of reading.
        budget: Tokens of the whole text.
        count_tokens: Counts a text's tokens: ``count_tokens_of(lm)``. By default they are estimated, on the high side
            (``estimate_tokens``).
        timeout: Seconds that the sources have, all together.
        near: An item of which this part, in (0, 1], stands in one item taken before is a duplicate: by characters of
            whole sentences, whatever their order, case, blanks, list marks and full stops. 1 loses nothing.
        mark: What stands before each item: ``{source}`` and ``{identity}`` are filled in.

    Raises:
        ConfigError: Two sources of one name, or a setting that is not allowed.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        budget: int = 1024,
        count_tokens: CountTokens = estimate_tokens,
        timeout: float = 2.0,
        near: float = 1.0,
        mark: str = "[{source}:{identity}] ",
    ) -> None:
        self.sources = tuple(sources)
        self.budget = _checked(budget)
        self.count_tokens = count_tokens
        self.timeout = timeout
        self.near = near
        self.mark = mark
        _check_names(self.sources)
        if not timeout > 0:
            raise ConfigError(f"timeout={timeout!r}: no source can answer in that. Give seconds above 0.")
        if not 0 < near <= 1:
            raise ConfigError(f"near={near!r} is no part of an item. Give one above 0, at most 1 (the whole item).")
        try:
            mark.format(source="source", identity="1")
        except (LookupError, ValueError, AttributeError) as exc:
            raise ConfigError(
                f"mark={mark!r} cannot be filled in: {exc}. It may hold {{source}}, {{identity}}."
            ) from exc
        self._overdue: dict[str, list[Future[list[Item]]]] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        query: str,
        *,
        history: "dspy.History | Sequence[Mapping[str, Any]] | None" = None,
        extra: Iterable[Source] = (),
        budget: int | None = None,
    ) -> Assembled:
        """Assembles the context for a query.

        Args:
            query: What the sources are asked.
            history: The conversation so far, for the History among the sources; where there is none, one is added at
                the end.
            extra: Sources of this call, read after the others.
            budget: Tokens in this call; None takes the assembler's.

        Raises:
            ConfigError: A negative budget, or an extra source with the name of another one.
        """
        budget = self.budget if budget is None else _checked(budget)
        sources = _with_history([*self.sources, *extra], history)
        _check_names(sources)
        found = self._ask(sources, query)
        selection = Selection(budget, self.count_tokens, self.near, self.mark)
        for source in sorted(sources, key=lambda source: -source.priority):
            outcome = found[source.name]
            if isinstance(outcome, LeftOut):
                logger.warning("context without source %r: %s", source.name, outcome.detail)
                selection.left_out.append(outcome)
            else:
                selection.offer(source, outcome[:MOST_ITEMS])
                if len(outcome) > MOST_ITEMS:
                    detail = f"only its first {MOST_ITEMS} items were read"
                    selection.left_out.append(LeftOut(source.name, "", "budget", detail))
        text, placed = selection.finish(functools.partial(_in_reading_order, sources))
        tokens = self.count_tokens(text) if text else 0
        return Assembled(text, tokens, budget, tuple(placed), tuple(selection.left_out))

    async def acall(
        self,
        query: str,
        *,
        history: "dspy.History | Sequence[Mapping[str, Any]] | None" = None,
        extra: Iterable[Source] = (),
        budget: int | None = None,
    ) -> Assembled:
        """Async equivalent of ``__call__``: the event loop goes on meanwhile."""
        work = functools.partial(self, query, history=history, extra=extra, budget=budget)
        return await asyncio.wrap_future(_in_thread(work))

    def __copy__(self) -> "ContextAssembler":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextAssembler":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("budget", "count_tokens", "timeout", "near", "mark")
        settings = {name: getattr(self, name) for name in names}
        return functools.partial(ContextAssembler, **settings), (self.sources,)

    def _ask(self, sources: Sequence[Source], query: str) -> dict[str, list[Item] | LeftOut]:
        """What each source has, or why it is left out; all side by side, until the time is up."""
        late = threading.Event()
        calls = {
            source.name: _in_thread(functools.partial(_read, source, query, late))
            for source in sources
            if self._may_ask(source.name)
        }
        in_time, _ = wait(calls.values(), self.timeout)
        late.set()
        return {source.name: self._outcome(source.name, calls.get(source.name), in_time) for source in sources}

    def _may_ask(self, name: str) -> bool:
        with self._lock:
            self._overdue[name] = [call for call in self._overdue.get(name, ()) if not call.done()]
            return len(self._overdue[name]) < MOST_OVERDUE

    def _outcome(
        self, name: str, call: "Future[list[Item]] | None", in_time: "set[Future[list[Item]]]"
    ) -> list[Item] | LeftOut:
        if call is None:
            return LeftOut(name, "", "slow", f"not asked: {MOST_OVERDUE} earlier calls of it have not returned yet")
        if call not in in_time:  # what it gives from now on may be a part
            with self._lock:
                self._overdue[name].append(call)
            return LeftOut(name, "", "slow", f"no answer within {self.timeout:g} s")
        if exc := call.exception():
            return LeftOut(name, "", "failed", f"{type(exc).__name__}: {exc}")
        return call.result()


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    """Starts work in a thread with the caller's context. A pool's threads would be waited for at the process's end."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on a cancelled waiter cannot cancel it

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - whatever it is, who waits shall know
            future.set_exception(exc)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:  # the system gives no more threads
        future.set_exception(exc)
    return future


def _read(source: Source, query: str, late: threading.Event) -> list[Item]:
    """A source's items; stops where nobody waits for them any more."""
    items: list[Item] = []
    for item in islice(source.items(query), MOST_ITEMS + 1):
        if late.is_set():
            break
        items.append(item)
    return items


def _with_history(sources: list[Source], history: Any) -> list[Source]:
    """The sources, with the conversation for the History among them."""
    if history is None:
        return sources
    if not any(isinstance(source, History) for source in sources):
        sources = [*sources, History()]
    return [source.of(history) if isinstance(source, History) else source for source in sources]


def _in_reading_order(sources: Sequence[Source], placed: list[Placed]) -> list[Placed]:
    """Source by source as they were given, a conversation from old to new."""
    mine = {source.name: [each for each in placed if each.source == source.name] for source in sources}
    return [each for source in sources for each in mine[source.name][:: -1 if source.backwards else 1]]


def _check_names(sources: Sequence[Source]) -> None:
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two sources are called {twice[0]!r}. Give each a name of its own: marks must tell them apart."
        )


def _checked(budget: int) -> int:
    if budget < 0:
        raise ConfigError(f"budget={budget!r} tokens: give 0 or more.")
    return budget
