"""Noisy copies of the training rows: for few rows, cheap stand-ins for more of them."""

import random
from collections.abc import Sequence

from dspy_lora.training.rendering import Row

_CUT, _SHORT, _KEPT = 0.6, 12, (0.6, 0.95)  # share of the texts of more words that are cut, and of the words that stay
_DROPPED = (0.05, 0.1, 0.2)  # shares of the words that go, as in EDA; one for each text
_SWAPPED = 0.05  # swaps for each word


def with_noisy_copies(
    rows: Sequence[Row], fields: Sequence[str], copies: int, seed: int
) -> tuple[list[Row], list[int]]:
    """Adds noisy copies of every row, and shuffles.

    A copy is a stretch of the text without some of its words and with others swapped: random deletion and swap of EDA
    (Wei & Zou 2019, arXiv 1901.11196), after a cut at both ends. Its outputs stay, so it is for tasks whose answer does
    not hang on single words, such as classification. Words are what blanks part: a text of a few comes out as it is in
    one copy of two or more, a longer one in few.

    Args:
        rows: The rows to train on.
        fields: Their input texts.
        copies: Copies of each row; with 0 the rows come back as they are.
        seed: Decides the noise and the order.

    Returns:
        ``(1 + copies) * len(rows)`` rows, and of each the place in ``rows`` of the one that it is or copies.
    """
    order = list(range((1 + copies) * len(rows)))
    if not copies:
        return list(rows), order
    rng = random.Random(seed)
    every = list(rows)
    for _ in range(copies):
        every += [row | {name: _noisy(str(row[name]), rng) for name in fields if row.get(name)} for row in rows]
    rng.shuffle(order)
    return [every[place] for place in order], [place % len(rows) for place in order]


def _noisy(text: str, rng: random.Random) -> str:
    words = text.split()
    if len(words) > _SHORT and rng.random() < _CUT:
        kept = int(len(words) * rng.uniform(*_KEPT))
        start = rng.randrange(len(words) - kept + 1)
        words = words[start : start + kept]
    share = rng.choice(_DROPPED)
    words = [word for word in words if rng.random() > share] or words
    for _ in range(int(len(words) * _SWAPPED)):
        one, other = rng.randrange(len(words)), rng.randrange(len(words))
        words[one], words[other] = words[other], words[one]
    return " ".join(words)
