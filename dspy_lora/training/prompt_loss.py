"""A trainer with the prompt's tokens in the loss too.

Imported only where a trainer is made, since its class needs trl at import.
"""

from typing import Any

import torch

from dspy_lora.training.validation_loss import TokenMeanTrainer


class PromptLossTrainer(TokenMeanTrainer):
    """Learns the prompt beside the completion, as a language model.

    Args:
        prompt_loss_weight: Weight of a prompt's token in the training loss, a completion's having 1; validation losses
            stay those of completions.
        **arguments: TRL's own.
    """

    def __init__(self, prompt_loss_weight: float, **arguments: Any) -> None:
        self._weight = prompt_loss_weight
        super().__init__(**arguments)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sums the weighted losses of a batch's tokens, and divides by how many of them are completions'.

        A mixture of experts adds the loss that balances its experts' load, as in TRL.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        every = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = model(**inputs | {"labels": every, "use_cache": False}, fused_lm_head=True)
        answers = labels[:, 1:] != -100
        self._metrics["train"]["mean_token_accuracy"].append(outputs.is_top1[answers].float().mean().item())
        weights = torch.where(answers, 1.0, self._weight)  # padding has log-probabilities of 0
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        loss = -(outputs.log_probs * weights).sum() / count * (self.accelerator.num_processes if shared else 1)
        if self.aux_loss_enabled:  # which made the model's configuration ask for router logits
            # A mean over the micro-batch, where the sum above is the micro-batch's share of the step's loss.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return (loss, outputs) if return_outputs else loss
