"""TRL's SFTTrainer with a validation loss that no batch size changes.

Imported only where a trainer is made, since its class needs trl at import.
"""

from typing import Any

import torch
from trl import SFTTrainer


class TokenMeanTrainer(SFTTrainer):
    """Averages the validation loss over all answers' tokens; transformers averages the batches' averages."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Sums the tokens' losses, and divides once by how many they are."""
        self._summed = torch.zeros(2, dtype=torch.float64)  # losses, tokens
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss, tokens = self.accelerator.reduce(self._summed.to(self.args.device), "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Counts a batch's mean loss once for each of its tokens."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        self._summed += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        return loss, logits, labels
