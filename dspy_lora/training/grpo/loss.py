"""The loss of TRL's GRPOTrainer (trl 1.16, ``_compute_loss``), which a test compares.

The trainer itself samples by its own means and imports vLLM, which a process beside an engine must not.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dspy_lora.training.grpo.settings import GRPOSettings

if TYPE_CHECKING:
    import torch

# Keeps the advantages of a group with nearly equal rewards finite (TRL's GRPOTrainer).
_STD_FLOOR = 1e-4


def advantages(groups: Sequence[Sequence[float]], scale: Literal["group", "batch", "none"]) -> list[list[float]]:
    """Rewards as distances from the group's mean, in standard deviations of the group, of the batch, or as they are.

    Args:
        groups: The rewards of each group.
        scale: What to divide by.
    """
    everything = [reward for group in groups for reward in group]
    found = []
    for group in groups:
        if max(group) == min(group):  # whose mean may differ from them by rounding
            found.append([0.0] * len(group))
            continue
        mean = sum(group) / len(group)
        width = 1.0 if scale == "none" else deviation(group if scale == "group" else everything) + _STD_FLOOR
        found.append([(reward - mean) / width for reward in group])
    return found


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1), as in TRL; that of one value is 0."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def token_losses(
    logps: "torch.Tensor",
    old_logps: "torch.Tensor",
    advantage: "torch.Tensor",
    settings: GRPOSettings,
    reference_logps: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The loss of each token: PPO's clipped ratio times the advantage, and the KL divergence where ``beta`` asks.

    Equation 3 of 2402.03300 with the k3 estimate of the divergence (equation 4), and DAPO's upper bound of its own.

    Args:
        logps: Log-probabilities of the sampled tokens, (answers, tokens).
        old_logps: The same before the first optimizer step on this batch.
        advantage: Of each answer, (answers,).
        settings: epsilon, epsilon_high, beta.
        reference_logps: The same under the reference policy; needed where ``beta`` is not 0.

    Returns:
        (answers, tokens), padding not yet masked.
    """
    ratio = (logps - old_logps).exp()
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    gain = advantage.unsqueeze(1)
    clipped = ratio.clamp(1 - settings.epsilon, 1 + high)
    losses = -(ratio * gain).minimum(clipped * gain)
    if reference_logps is None:
        return losses
    apart = reference_logps - logps
    return losses + settings.beta * (apart.exp() - apart - 1)


def token_weights(lengths: Sequence[int], loss_type: str, max_tokens: int) -> list[float]:
    """What one token of each answer weighs in the loss of the whole batch, so that parts of a batch add up to it.

    Args:
        lengths: Tokens of every answer of the batch.
        loss_type: See ``GRPOSettings``.
        max_tokens: Longest answer that could have been sampled; "dr_grpo" divides by it.
    """
    if loss_type == "dapo":
        return [1 / sum(lengths)] * len(lengths)
    if loss_type == "dr_grpo":
        return [1 / (len(lengths) * max_tokens)] * len(lengths)
    return [1 / (len(lengths) * length) for length in lengths]
