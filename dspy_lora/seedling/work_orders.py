"""More rows for the work-order adapter: ``python -m dspy_lora.seedling.work_orders --data DIR --output FOLDER``.

DIR holds ``manufacturing/work_order_items/{train,dev,test}.jsonl``, whose labels list equipment items as they stand in
the text, and ``manufacturing/maintnorm/train.jsonl``, of which only the texts are read. A conditional random field
(Lafferty et al. 2001) learns the labelled rows and labels other texts: MaintNorm's, and the rows' own with items
exchanged for items of other rows (mention replacement, Dai & Adel 2020, arXiv 2010.11683). FOLDER gets ``train.jsonl``,
the labelled rows three times and the others once, and ``dev.jsonl`` as it is. Needs python-crfsuite.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dspy_lora.training.data import read_rows
from dspy_lora.training.rendering import Row

_SET, _TEXTS = "manufacturing/work_order_items", "manufacturing/maintnorm"
_PASSES, _EXCHANGED = 8, 0.6  # over the labelled rows, and the share of their items that go
_LONGEST = 80  # characters of a text that is made up
_WEIGHT = 3  # of a labelled row beside one that the tagger labels
_CRF = {"c1": 0.05, "c2": 0.05, "max_iterations": 120, "feature.possible_transitions": True}
_MACHINE = re.compile(r"\b[a-z]{1,3}\d{3,5}\b")  # in MaintNorm's texts, where the labelled rows have ITEM_ID
_BEGIN, _INSIDE, _OUTSIDE = "BIO"


class Tagger:
    """A conditional random field over a text's words (CRFsuite, Okazaki 2007).

    Args:
        rows: Labelled rows, whose labels' items stand in their texts.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        import pycrfsuite

        trainer = pycrfsuite.Trainer(verbose=False, params=_CRF)
        for row in rows:
            words = row["text"].split()
            trainer.append(_features(words), tags(words, row["label"]))
        self._tagger = pycrfsuite.Tagger()
        with tempfile.TemporaryDirectory() as folder:
            trainer.train(str(Path(folder, "model")))
            self._model = Path(folder, "model").read_bytes()  # CRFsuite reads it where it lies
        self._tagger.open_inmemory(self._model)

    def label(self, text: str) -> str:
        """The items of a text as a label; "" where there are none."""
        words = text.split()
        return "; ".join(items(words, self._tagger.tag(_features(words))))


def tags(words: Sequence[str], label: str) -> list[str]:
    """A label as one tag a word: ``B`` begins an item, ``I`` is inside one, ``O`` outside.

    Args:
        words: Of the text.
        label: Items in the text's order, separated by ``"; "``.

    Raises:
        ValueError: An item does not stand in the text, after the one before.
    """
    lower, found, start = [word.lower() for word in words], [_OUTSIDE] * len(words), 0
    for item in label.lower().split("; "):
        parts = item.split()
        start = next((at for at in range(start, len(words)) if lower[at : at + len(parts)] == parts), -1)
        if start < 0:
            raise ValueError(f"{item!r} of {label!r} is not in {' '.join(words)!r}")
        end = start + len(parts)
        found[start:end] = [_BEGIN] + [_INSIDE] * (len(parts) - 1)
        start = end
    return found


def items(words: Sequence[str], found: Sequence[str]) -> list[str]:
    """The items that tags mark."""
    return [" ".join(part) for part, tag in _parts(words, found) if tag == _BEGIN]


def exchanged(row: Row, mentions: Sequence[str], rng: random.Random) -> str:
    """A row's text with some of its items exchanged for others.

    Args:
        row: A labelled row.
        mentions: The others.
        rng: Decides which, and for what.
    """
    words, text = row["text"].split(), []
    for part, tag in _parts(words, tags(words, row["label"])):
        new = tag == _BEGIN and rng.random() < _EXCHANGED
        text.append(rng.choice(mentions) if new else " ".join(part))
    return " ".join(text)


def enlarged(rows: Sequence[Row], texts: Sequence[str], known: set[str], tagger: Tagger, seed: int = 0) -> list[Row]:
    """Labelled rows, and texts that a tagger labels.

    Args:
        rows: Labelled rows.
        texts: Texts without labels, of the same kind.
        known: Texts that must not be among the new rows: those of the rows, and of rows to validate and test on.
        tagger: Labels them.
        seed: Decides what is exchanged, and the order.

    Returns:
        Shuffled rows.
    """
    rng = random.Random(seed)
    new = [text for text in map(_plain, texts) if text not in known]
    new += _made_up(rows, known, rng)
    found = [{"text": text, "label": tagger.label(text)} for text in new]
    every = [*rows] * _WEIGHT + [row for row in found if row["label"]]
    rng.shuffle(every)
    return every


def _made_up(rows: Sequence[Row], known: set[str], rng: random.Random) -> Iterator[str]:
    """Texts with items exchanged, none of them twice."""
    mentions = [item for row in rows for item in row["label"].split("; ")]
    seen = set(known)
    for row in [*rows] * _PASSES:
        text = exchanged(row, mentions, rng)
        if text not in seen and len(text) <= _LONGEST:
            yield text
        seen.add(text)


def _plain(text: str) -> str:
    """A text of MaintNorm as the labelled rows are written."""
    return " ".join(_MACHINE.sub("ITEM_ID", text.lower()).split())


def _parts(words: Sequence[str], found: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """A text's items and the words outside, in order, each with its first tag; an ``I`` after an ``O`` begins one."""
    part: list[str] = []
    for word, tag in zip(words, found, strict=True):
        if tag == _INSIDE and part:
            part.append(word)
            continue
        if part:
            yield part, _BEGIN
        part = []
        if tag == _OUTSIDE:
            yield [word], _OUTSIDE
        else:
            part = [word]
    if part:
        yield part, _BEGIN


def _features(words: Sequence[str]) -> list[list[str]]:
    """What the field sees of each word: it and its neighbours, their ends, and pairs and threes of them."""
    shapes = ["", "", *(re.sub(r"\d", "9", word.lower()) for word in words), "", ""]
    return [_around(shapes[at : at + 5]) for at in range(len(words))]


def _around(shapes: Sequence[str]) -> list[str]:
    """The features of the middle one of five words."""
    far, before, word, after, beyond = shapes
    found = ["bias"]
    for at, each in enumerate(shapes):
        found += [f"word {at} {each}", f"stem {at} {each[:-1] if len(each) > 3 and each.endswith('s') else each}"]
    for at, each in enumerate((before, word, after)):
        found += [f"end {at} {letters} {each[-letters:]}" for letters in (2, 3, 4)] + [f"start {at} {each[:3]}"]
    pairs = {"to": (before, word), "from": (word, after), "left": (far, before), "right": (after, beyond)}
    found += [f"{name} {one}|{other}" for name, (one, other) in pairs.items()]
    found += [name for name, each in (("first", before), ("last", after)) if not each]
    return [*found, f"three {before}|{word}|{after}", f"gap {before}|{after}"]


def main() -> None:
    """Writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the domains' folders")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the rows go")
    args = parser.parse_args()
    train, dev, test = (read_rows(args.data / _SET / f"{name}.jsonl") for name in ("train", "dev", "test"))
    texts = [row["text"] for row in read_rows(args.data / _TEXTS / "train.jsonl")]
    tagger = Tagger(train)
    rows = enlarged(train, texts, {row["text"] for row in (*train, *dev, *test)}, tagger)
    right = sum(tagger.label(row["text"]) == row["label"] for row in dev) / len(dev)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, found in (("train", rows), ("dev", dev)):
        _write(args.output / f"{name}.jsonl", found)
    print(f"{len(rows)} rows, {len(train)} of them labelled; the tagger alone has {right:.3f} of {len(dev)} dev rows")


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
