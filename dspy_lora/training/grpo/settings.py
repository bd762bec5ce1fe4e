"""What GRPO on a LoRALM may be told."""

from pathlib import Path
from typing import Literal

import pydantic

from dspy_lora.training.settings import SEVEN_PROJECTIONS, TrainConfig

# What both kinds of runs have, and load the base and shape the adapter by.
_OF_LOADING = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "qlora", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "dtype", "seed",
}  # fmt: skip


class GRPOSettings(pydantic.BaseModel):
    """What ``dspy.GRPO(train_kwargs={...})`` may set for a LoRALM; named as in trl.GRPOConfig and peft.LoraConfig.

    Attributes:
        adapter: Name of the adapter in the registry; None is ``"legal-grpo"`` where ``"legal"`` goes on, and
            ``"base-grpo"`` for a fresh one.
        output_dir: Where the run's folder (metrics, log, the adapters of the last steps) lands; None is DSPy's own
            place (``DSPY_FINETUNEDIR``).
        learning_rate: Of AdamW; constant, since DSPy does not say how many steps there will be.
        max_grad_norm: The gradient is cut to this length.
        beta: Weight of the KL divergence (k3 estimate, nats a token) from the policy that the run starts with.
        epsilon: The probability ratio counts down to ``1 - epsilon``.
        epsilon_high: And up to ``1 + epsilon_high``; None is ``epsilon``, DAPO (2503.14476) proposes 0.28.
        num_iterations: Optimizer steps on one batch. With one, all ratios are 1 and nothing is clipped.
        loss_type: How token losses are averaged: over each answer, then over answers ("grpo", 2402.03300); over all
            tokens of the batch ("dapo"); over the largest possible number of tokens ("dr_grpo", 2503.20783).
        scale_rewards: Divide advantages by the standard deviation of the rewards in the group or the batch, or not at
            all (as "dr_grpo" wants).
        num_generations: Answers in a group; DSPy sets it, nothing here depends on it.
        micro_batch_size: Answers in one forward pass.
        max_length: Longest prompt and answer in tokens; None is the base's context. A longer answer counts in its
            group's mean reward and is not trained on.
        lora_dropout: Of a fresh adapter. Training switches it off: it would move the ratios.
        keep: Revisions of the last steps that stay on the disk, beside checkpoints.
        share_gpu: Whether the engine ends for each step and the trainer leaves the GPU after it; None does so where
            both need the same GPU and the engine may take more than half of it.
        adapter_dtype: Number format of published weights; the trainer's own stay float32.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    adapter: str | None = None
    output_dir: Path | None = None
    learning_rate: float = pydantic.Field(default=1e-4, gt=0)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    beta: float = pydantic.Field(default=0.0, ge=0)
    epsilon: float = pydantic.Field(default=0.2, gt=0, lt=1)
    epsilon_high: float | None = pydantic.Field(default=None, gt=0)
    num_iterations: int = pydantic.Field(default=1, gt=0)
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    num_generations: int | None = pydantic.Field(default=None, gt=0)
    micro_batch_size: int = pydantic.Field(default=8, gt=0)
    max_length: int | None = pydantic.Field(default=None, gt=1)
    r: int = pydantic.Field(default=16, gt=0)
    lora_alpha: int = pydantic.Field(default=32, gt=0)
    lora_dropout: float = pydantic.Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = SEVEN_PROJECTIONS
    use_rslora: bool = True
    qlora: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = True
    seed: int = pydantic.Field(default=0, ge=0)
    keep: int = pydantic.Field(default=2, gt=0)
    share_gpu: bool | None = None
    adapter_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def loading(self, folder: Path) -> TrainConfig:
        """The same settings as a supervised run has them, to load the base and shape the adapter by."""
        shared = self.model_dump(include=_OF_LOADING)
        return TrainConfig(signature=None, train=[], output_dir=folder, **shared)
