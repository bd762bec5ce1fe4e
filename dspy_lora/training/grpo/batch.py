"""Sampled answers, and a forward pass of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answer:
    """One sampled answer, ready for the loss.

    Attributes:
        prompt: Token ids.
        tokens: Token ids of the answer, with the end-of-sequence token unless ``max_tokens`` cut it off.
        advantage: By how much it was better than its group.
    """

    prompt: list[int]
    tokens: list[int]
    advantage: float


@dataclass(frozen=True)
class Batch:
    """Answers padded for one forward pass: prompts to the left, answers to the right.

    Attributes:
        ids: Prompts and answers, (answers, prompt + answer tokens).
        attention: 1 where ``ids`` is no padding.
        answers: The answers' token ids, (answers, answer tokens).
        mask: 1.0 where ``answers`` is no padding.
        weights: What each token weighs in the loss, 0 for padding.
        advantage: (answers,).
    """

    ids: "torch.Tensor"
    attention: "torch.Tensor"
    answers: "torch.Tensor"
    mask: "torch.Tensor"
    weights: "torch.Tensor"
    advantage: "torch.Tensor"

    @classmethod
    def of(cls, part: Sequence[tuple[Answer, float]], pad: int, device: Any) -> "Batch":
        """Pads answers, each with the weight of one of its tokens."""
        import torch

        left = max(len(answer.prompt) for answer, _ in part)
        right = max(len(answer.tokens) for answer, _ in part)
        rows, shown, mask = [], [], []
        for answer, _ in part:
            before, after = left - len(answer.prompt), right - len(answer.tokens)
            rows.append([pad] * before + answer.prompt + answer.tokens + [pad] * after)
            shown.append([0] * before + [1] * (left - before + right - after) + [0] * after)
            mask.append([1.0] * len(answer.tokens) + [0.0] * after)
        ids, marks = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
        weights = torch.tensor([weight for _, weight in part], device=device).unsqueeze(1)
        gains = torch.tensor([answer.advantage for answer, _ in part], device=device)
        return cls(ids, torch.tensor(shown, device=device), ids[:, left:], marks, marks * weights, gains)
