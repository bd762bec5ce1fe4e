"""Texts that are nearly equal: those whose sets of shingles have a Jaccard similarity of at least a threshold.

Prefix filtering proposes the pairs (Chaudhuri, Ganti, Kaushik 2006; with more than one shared element as in Wang, Li,
Feng 2012): two texts at the threshold share so many shingles that some of them are among the rarest of both. Only pairs
with that many are compared, so what many texts share, such as a template around them, proposes none. No pair is
overlooked.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Characters in a shingle. Characters and not words: one word changed in a question of twelve words leaves a Jaccard
# similarity of about 0.7 to 0.8 this way, of 0.2 to 0.4 with shingles of five words; and scripts without spaces work.
SHINGLE = 5

# Shingles that two texts must share among their rarest to be compared, and the part of a long text's. Fewer propose
# each pair with a few rare words in common, more take in shingles that are less rare.
_SHARED, _PART = 16, 1 / 16

# Counters of shingles, 32 MiB: those that share one count as more frequent than they are, which costs time alone.
_COUNTERS = 1 << 22

# Marks that change what a text says: 20 - 1, 20 % 3, C#, @here. Symbols (20 + 1, C++, a < b, 5 €) are no marks at all.
_TELLING = "#%&*-/@\\"
_HYPHENS = str.maketrans("\u2010\u2212", "--")  # hyphen and minus sign

_ROUNDING = 1e-9  # below a whole number of shingles, above the error of a product with the threshold

_RNG = np.random.default_rng(20_241)  # fixed: the order of equally rare shingles depends on no seed
_PLACES = _RNG.integers(1, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Hashes = NDArray[np.uint64]


def near_duplicates(texts: Sequence[str], ranks: Sequence[int], threshold: float) -> dict[int, tuple[int, float]]:
    """Finds, for each text, one of a higher rank that it nearly equals.

    Args:
        texts: The texts.
        ranks: Where each belongs (validation above training, test above validation). Equal ranks are not compared.
        threshold: Smallest Jaccard similarity of two texts' shingles that makes them near-duplicates, in (0, 1].

    Returns:
        By index of the lower-ranked text: the index of the other one and their similarity. A text that is itself such
        a duplicate can be the other one.
    """
    found: dict[int, tuple[int, float]] = {}
    if not texts:
        return found
    levels = np.asarray(ranks)
    rarest, shared = _rarest(texts, threshold)
    index = _Index(rarest, shared, np.flatnonzero(levels > levels.min()))
    for i in np.flatnonzero(levels < levels.max()).tolist():
        others = index.sharing(rarest[i], shared[i])
        for j in others[levels[others] > levels[i]].tolist():
            if (similarity := jaccard(texts[i], texts[j])) >= threshold:
                found[i] = j, similarity
                break
    return found


def jaccard(first: str, second: str) -> float:
    """Shared shingles over all shingles of two texts, 0 to 1."""
    one, two = _shingles(first), _shingles(second)
    shared = len(np.intersect1d(one, two, assume_unique=True))
    return shared / (len(one) + len(two) - shared)


def _normal(text: str) -> str:
    """Case, sentence marks, blanks and the ways to write one character do not make a text another one."""
    return _dropped().sub(" ", unicodedata.normalize("NFKC", text).casefold().translate(_HYPHENS)).strip()


@functools.cache
def _dropped() -> re.Pattern[str]:
    """Blanks, sentence marks, quotes, brackets, control characters; none above U+FFFF, which would take 6 x longer."""
    chars = [char for char in map(chr, range(0x10000)) if char not in _TELLING]
    marks = "".join(char for char in chars if unicodedata.category(char)[0] in "PZ" or _is_control(char))
    return re.compile(f"[{re.escape(marks)}]+")


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf")


@functools.lru_cache(maxsize=4096)
def _shingles(text: str) -> Hashes:
    """The 64-bit hashes of a text's shingles, sorted, each once; a text of marks alone is hashed as it is.

    Shingles reach over both ends, so that a character there is in as many as any other: 2 + 1 is not nearly 2 + 3.
    """
    codes = np.frombuffer((_normal(text) or text).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(codes, SHINGLE - 1), SHINGLE)
    return np.unique(_mix((windows * _PLACES).sum(axis=1, dtype=np.uint64)))


def _mix(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _rarest(texts: Sequence[str], threshold: float) -> tuple[list[Hashes], list[int]]:
    """Each text's rarest shingles, and how many of them a near-duplicate has among its own.

    A text at the threshold lacks at most so many shingles of this one, and its number of shared ones is added. So of
    the shingles that two such texts share, the rarest are among these of both: as many as the text with the smaller
    number wants. For that, rare only has to mean the same for all texts.
    """
    counts = np.zeros(_COUNTERS, np.int64)
    for text in texts:
        counts[_shingles(text) % _COUNTERS] += 1
    rarest, shared = [], []
    for text in texts:
        shingles = _shingles(text)
        needed = math.ceil(threshold * len(shingles) - _ROUNDING)
        shared.append(min(needed, max(_SHARED, int(_PART * len(shingles)))))
        order = np.argsort(counts[shingles % _COUNTERS], kind="stable")  # among equals the smaller hash
        rarest.append(shingles[order[: len(shingles) - needed + shared[-1]]])
    return rarest, shared


class _Index:
    """Which of some texts have a shingle among their rarest.

    Args:
        rarest: The rarest shingles of all texts.
        shared: How many of them a near-duplicate has.
        chosen: The texts that are looked up.
    """

    def __init__(self, rarest: Sequence[Hashes], shared: Sequence[int], chosen: NDArray[np.intp]) -> None:
        shingles = np.concatenate([np.empty(0, np.uint64), *(rarest[i] for i in chosen)])
        owners = np.repeat(np.arange(len(chosen)), [len(rarest[i]) for i in chosen])
        order = np.argsort(shingles, kind="stable")
        self._chosen, self._shingles, self._owners = chosen, shingles[order], owners[order]
        self._shared = np.array([shared[i] for i in chosen], np.intp)

    def sharing(self, shingles: Hashes, least: int) -> NDArray[np.intp]:
        """The texts that have so many of the shingles, or as many as they ask for, those with most of them first."""
        first, last = (np.searchsorted(self._shingles, shingles, side) for side in ("left", "right"))
        hits = [self._owners[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]
        if not hits:
            return np.empty(0, np.intp)
        shared = np.bincount(np.concatenate(hits), minlength=len(self._chosen))
        places = np.flatnonzero(shared >= np.minimum(self._shared, least))
        return self._chosen[places[np.argsort(-shared[places], kind="stable")]]
