"""Texts for rule tasks: a natural text that holds a chosen keyword and none of the others."""

from random import Random

from dspy_lora.seedling.phrasing import pick
from dspy_lora.seedling.task import World
from dspy_lora.seedling.words import word


def insert(rng: Random, text: str, phrase: str) -> str:
    """``phrase`` put between two words of ``text``, sometimes between commas, brackets or quotes."""
    words = text.split(" ")
    spot = rng.randint(0, len(words))
    dressed = rng.choice((phrase,) * 7 + (f"({phrase})", f'"{phrase}"', f"the {phrase}", f"{phrase},"))
    if spot == 0 and rng.random() < 0.5:
        dressed = dressed[0].upper() + dressed[1:]
    return " ".join(words[:spot] + [dressed] + words[spot:])


def length(rng: Random) -> int:
    """How many sentences a text has: mostly one or two."""
    return rng.choices((1, 2, 3, 5), (55, 28, 12, 5))[0]


def text_with(rng: Random, world: World, keywords: list[str], avoid: list[str]) -> str:
    """A text in which every one of ``keywords`` occurs and no word of ``avoid`` does.

    Args:
        rng: The randomness.
        world: Sentences and the split.
        keywords: The words that must occur, in this order if there are several; may be empty.
        avoid: Words that must not occur (those of ``keywords`` may be among them).
    """
    others = [word for word in avoid if word not in keywords]
    if not keywords:
        return _bare(rng, world, others)
    if len(keywords) > 1:
        return " ".join(text_with(rng, world, [one], avoid) for one in keywords)
    only = keywords[0]
    mode = rng.random()
    if mode < 0.35:
        natural = world.pool.holding(rng, only, others)
        if natural is not None:
            return natural
    if mode < 0.5:
        text = _carrier(rng, world, only, others)
    elif mode < 0.58:
        text = " ".join(_shuffled(rng, [only, *_fillers(rng, world, [*others, only], rng.randint(1, 6))]))
    else:
        return insert(rng, world.pool.draw(rng, avoid, length(rng)), only)
    if rng.random() < 0.5:
        extra = world.pool.draw(rng, avoid)
        return f"{extra} {text}" if rng.random() < 0.5 else f"{text} {extra}"
    return text


def _bare(rng: Random, world: World, avoid: list[str]) -> str:
    mode = rng.random()
    if mode < 0.25:
        return insert(rng, world.pool.draw(rng, avoid, length(rng)), _fillers(rng, world, avoid, 1)[0])
    if mode < 0.4:
        return _carrier(rng, world, _fillers(rng, world, avoid, 1)[0], avoid)
    if mode < 0.48:
        return " ".join(_fillers(rng, world, avoid, rng.randint(2, 7)))
    return world.pool.draw(rng, avoid, length(rng))


def _carrier(rng: Random, world: World, keyword: str, avoid: list[str]) -> str:
    for _ in range(8):
        text = pick(rng, "carrier", world.split, k=keyword)
        if not any(other in text.lower() for other in avoid if other != keyword):
            return text
    return keyword


def _fillers(rng: Random, world: World, avoid: list[str], count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        new = word(rng, world.split)
        if not any(other in new or new in other for other in avoid):
            found.append(new)
    return found


def _shuffled(rng: Random, words: list[str]) -> list[str]:
    rng.shuffle(words)
    return words
