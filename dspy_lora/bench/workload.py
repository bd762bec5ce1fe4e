"""What is asked: prompts of the twelve domains, as DSPy writes them."""

import dataclasses
import functools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import dspy

from dspy_lora.config import load_config

# Words of the seedling's tokenizer, so that 30 to 50 of them make a prompt of about 200 tokens.
_WORDS = (
    "the order of a new account was paid by bank in March while work on old pump and main line went well after "
    "long test they said that price for second part will rise again because court has not yet named other side"
).split()


@dataclasses.dataclass(frozen=True)
class Question:
    """One call.

    Attributes:
        domain: Its adapter.
        text: The input field.
        messages: What DSPy's chat adapter makes of it.
    """

    domain: str
    text: str
    messages: list[dict[str, Any]]

    @property
    def prompt(self) -> str:
        """The messages in one text, for calls of an LM itself."""
        return "\n\n".join(message["content"] for message in self.messages)


def adapter_names(count: int) -> list[str]:
    """Names of as many adapters: the domains', then ``adapter-13`` and so on."""
    domains = list(load_config().domains)
    return [*domains[:count], *(f"adapter-{number}" for number in range(len(domains) + 1, count + 1))]


def questions(
    count: int, seed: int, words: tuple[int, int] = (30, 50), names: Sequence[str] | None = None
) -> list[Question]:
    """Questions that no other seed asks, adapter after adapter in turn.

    Args:
        count: How many.
        seed: Another seed makes other texts, so that no prefix cache knows them.
        words: Least and most of a text.
        names: The adapters'; None takes the domains'.

    Returns:
        The questions.
    """
    chance, names = random.Random(seed), list(names or load_config().domains)
    return [_question(names[index % len(names)], chance, words) for index in range(count)]


def _question(domain: str, chance: random.Random, words: tuple[int, int]) -> Question:
    text = " ".join(chance.choices(_WORDS, k=chance.randint(*words)))
    return Question(domain, text, dspy.ChatAdapter().format(signature(domain), [], {"text": text}))


@functools.cache
def signature(domain: str) -> type[dspy.Signature]:
    """The task of a domain: text -> label. Adapters that are no domain have the domains' tasks in turn."""
    domains = load_config().domains
    if domain not in domains:
        number = int(domain.rpartition("-")[2])  # adapter_names gave it
        domain = list(domains)[(number - 1) % len(domains)]
    made: type[dspy.Signature] = dspy.Signature("text -> label", domains[domain].task)
    return made


class AnyText(dspy.ChatAdapter):
    """A chat adapter that takes any text for an answer: lengths are fixed here, not what is said."""

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        """The whole text in every output field."""
        return dict.fromkeys(signature.output_fields, completion)


def in_threads(calls: Sequence[Callable[[], Any]], threads: int) -> float:
    """Runs calls in a pool of threads that are started before the clock.

    Args:
        calls: What to run.
        threads: How many at once.

    Returns:
        Seconds from the first call's start to the last one's end.
    """
    waiting, gate, errors = iter(calls), threading.Barrier(threads + 1), list[BaseException]()
    lock = threading.Lock()

    def work() -> None:
        gate.wait()
        while not errors:
            with lock:
                call = next(waiting, None)
            if call is None:
                return
            try:
                call()
            except BaseException as exc:  # noqa: BLE001 - raised again below
                errors.append(exc)

    pool = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    for thread in pool:
        thread.join()
    seconds = time.perf_counter() - began
    if errors:
        raise errors[0]
    return seconds


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
