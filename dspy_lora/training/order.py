"""The order in which a run sees its rows, decided before it starts."""

from collections.abc import Sequence


def row_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Lays out every row of every optimizer step.

    A run that goes on from a checkpoint skips what it has seen and meets the same rows as an unbroken one, in any
    epoch: the trainer's own sampler would draw a later epoch's order from random numbers that the checkpoint lacks.
    Each epoch is transformers' grouping by length: a fresh shuffle, in which rows of like length share a batch.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows in one optimizer step.
        steps: Optimizer steps.
        seed: The same seed gives the same order.

    Returns:
        ``steps * batch_size`` row numbers; each row comes once before any row comes again.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    return order[: steps * batch_size]
