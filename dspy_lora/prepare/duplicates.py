"""Texts that are nearly equal, found by MinHash and settled by the exact Jaccard similarity of their shingles.

MinHash with banding (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) proposes pairs,
the exact similarity decides, so a pair below the threshold is never reported, and one at the threshold is overlooked
with a probability of at most ``_MISS``.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Characters in a shingle. Characters and not words: one word changed in a question of twelve words leaves a Jaccard
# similarity of about 0.7 to 0.8 this way, of 0.2 to 0.4 with shingles of five words; and scripts without spaces work.
SHINGLE = 5

# Hash functions. The estimate's standard deviation is at most 0.5 / sqrt(128) = 0.044.
_HASHES = 128
_ROWS_IN_A_BAND = (16, 8, 4, 2, 1)
_MISS = 1e-4

# A pair whose estimate is this far below the threshold is not looked at more closely: 4.5 standard deviations.
_SLACK = 0.2

_CHUNK = 4096  # shingles hashed at once: 4096 x 128 x 8 bytes = 4 MiB

_RNG = np.random.default_rng(20_241)  # fixed: what is a duplicate depends on no seed
_MULTIPLIERS = _RNG.integers(1, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RNG.integers(0, 2**63, _HASHES, dtype=np.uint64)
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
    signatures = np.stack([_minhash(text) for text in texts]) if texts else np.empty((0, _HASHES), np.uint64)
    levels = np.asarray(ranks)
    similar = functools.lru_cache(maxsize=65536)(lambda i, j: jaccard(texts[i], texts[j]))
    for bucket in _buckets(signatures, threshold):
        for i in bucket[levels[bucket] < levels[bucket].max()]:
            if int(i) in found:
                continue
            others = bucket[levels[bucket] > levels[i]]
            estimates = (signatures[others] == signatures[i]).mean(axis=1)
            for j in others[np.argsort(-estimates, kind="stable")][: int((estimates >= threshold - _SLACK).sum())]:
                if (similarity := similar(int(i), int(j))) >= threshold:
                    found[int(i)] = int(j), similarity
                    break
    return found


def jaccard(first: str, second: str) -> float:
    """Shared shingles over all shingles of two texts, 0 to 1."""
    one, two = _shingles(first), _shingles(second)
    shared = len(np.intersect1d(one, two, assume_unique=True))
    return shared / (len(one) + len(two) - shared)


def _normal(text: str) -> str:
    """Case, punctuation, blanks and the ways to write one character do not make a text another one."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


@functools.lru_cache(maxsize=4096)
def _shingles(text: str) -> Hashes:
    """The 64-bit hashes of a text's shingles, sorted, each once; a text without letters is hashed as it is."""
    codes = np.frombuffer((_normal(text) or text).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    return np.unique(_mix((windows * _PLACES).sum(axis=1, dtype=np.uint64)))


def _mix(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _minhash(text: str) -> Hashes:
    """The smallest value of each hash function (multiply-add-shift) over the shingles, (_HASHES,)."""
    shingles = _shingles(text)[:, None]
    chunks = (shingles[start : start + _CHUNK] for start in range(0, len(shingles), _CHUNK))
    smallest = [((chunk * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)).min(axis=0) for chunk in chunks]
    return np.min(smallest, axis=0)


def _buckets(signatures: Hashes, threshold: float) -> Iterator[NDArray[np.intp]]:
    """Groups of two or more texts whose signatures agree in a whole band; ascending indices in each."""
    rows = _rows(threshold)
    for start in range(0, _HASHES, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows])
        _, inverse, sizes = np.unique(band, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(inverse.reshape(-1), kind="stable")
        for group in np.split(order, np.cumsum(sizes)[:-1]):
            if len(group) > 1:
                yield group


def _rows(threshold: float) -> int:
    """Rows in a band: as many as overlook a pair at the threshold with a probability of at most ``_MISS``."""
    chances = {rows: (1 - threshold**rows) ** (_HASHES // rows) for rows in _ROWS_IN_A_BAND}
    return next((rows for rows, chance in chances.items() if chance <= _MISS), 1)
