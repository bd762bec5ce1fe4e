"""Training, validation and test rows: by chance, evenly by label, by group, or as given."""

import random
from collections.abc import Hashable, Sequence
from typing import Literal

from dspy_lora.errors import DataError
from dspy_lora.prepare.sources import Split

Method = Literal["random", "stratified", "group"]

# Rows that a label must have on average for the answers to count as labels.
_ROWS_PER_LABEL = 4


def are_labels(answers: Sequence[Hashable]) -> bool:
    """Whether the answers come from a small set, so that counting and balancing them makes sense."""
    distinct = len(set(answers))
    return distinct > 1 and distinct * _ROWS_PER_LABEL <= len(answers)


def count(part: float, rows: int) -> int:
    """Rows of a part that is given as a share (below 1) or as a number of rows."""
    return round(part * rows) if part < 1 else int(part)


def split(
    given: Sequence[Split | None],
    keys: Sequence[Hashable],
    method: Method,
    dev: float,
    test: float,
    seed: int,
) -> list[Split]:
    """Assigns rows to splits.

    Rows keep the split they were given in. A split that nobody gave is cut out of the rows to train on.

    Args:
        given: The split that each row was given in, None for none.
        keys: What ``method`` looks at: each row's label, or its group.
        method: ``"random"``; ``"stratified"``: each label's share of a split is its share of all rows to within a row,
            and one row at least of each label is trained on; ``"group"``: rows of one group stay together.
        dev: Rows to validate on: a share below 1 of the rows that are split, or a number; 0 for none.
        test: Rows to test on, likewise.
        seed: Decides which rows.

    Returns:
        The split of each row.

    Raises:
        DataError: More rows are asked for than there are, or a split that was asked for gets none.
    """
    result: list[Split] = [one or "train" for one in given]
    pool = [i for i, one in enumerate(given) if one in (None, "train")]
    wanted: dict[Split, float] = {"test": test, "dev": dev}
    sizes = {name: count(part, len(pool)) for name, part in wanted.items() if part and name not in given}
    if not pool:
        raise DataError("no row is left for train: each of them is given as a row to validate or test on.")
    if sum(sizes.values()) >= len(pool):
        asked = " and ".join(f"{size} {name}" for name, size in sizes.items())
        raise DataError(f"{asked} rows leave none of {len(pool)} to train on. Ask for fewer, or give more rows.")
    order = random.Random(seed).sample(pool, len(pool))
    chosen = _by_group(order, keys, sizes) if method == "group" else _by_row(order, keys, sizes, method)
    for name, members in chosen.items():
        if not members:
            raise DataError(
                f"no row is left for {name}: {wanted[name]:g} of {len(pool)} rows was asked for. Ask for more or for "
                "0, or give more rows."
            )
        for i in members:
            result[i] = name
    return result


def _by_row(
    order: list[int], keys: Sequence[Hashable], sizes: dict[Split, int], method: Method
) -> dict[Split, list[int]]:
    if method == "stratified":
        seen: set[Hashable] = set()
        first = {i for i in order if keys[i] not in seen and not seen.add(keys[i])}  # type: ignore[func-returns-value]
        ranks = {key: rank for rank, key in enumerate(dict.fromkeys(keys[i] for i in order))}
        order = sorted((i for i in order if i not in first), key=lambda i: ranks[keys[i]])
    chosen: dict[Split, list[int]] = {}
    for name, size in sizes.items():
        chosen[name] = _evenly(order, min(size, len(order)))
        taken = set(chosen[name])
        order = [i for i in order if i not in taken]
    return chosen


def _evenly(order: list[int], size: int) -> list[int]:
    """Rows at equal distances: of each run of equal keys its share, to within one row (systematic sampling)."""
    return [order[(2 * k + 1) * len(order) // (2 * size)] for k in range(size)]


def _by_group(order: list[int], keys: Sequence[Hashable], sizes: dict[Split, int]) -> dict[Split, list[int]]:
    """Groups in the order's turn, each into the first split that has room for all of it."""
    groups: dict[Hashable, list[int]] = {}
    for i in order:
        groups.setdefault(keys[i], []).append(i)
    chosen: dict[Split, list[int]] = {name: [] for name in sizes}
    for members in groups.values():
        name = next((name for name in sizes if len(chosen[name]) + len(members) <= sizes[name]), None)
        if name:
            chosen[name] += members
    for name, size in sizes.items():
        if size and not chosen[name]:
            smallest = min(len(members) for members in groups.values())
            raise DataError(
                f"no group fits into {size} {name} rows: of {len(groups)} groups the smallest has {smallest} rows. "
                f"Ask for more {name} rows, or split by another column."
            )
    return chosen
