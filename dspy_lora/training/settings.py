"""The settings of one training run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from dspy_lora.config import Config
from dspy_lora.training.data import Row

if TYPE_CHECKING:
    import dspy

SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainConfig(pydantic.BaseModel):
    """Everything one training run depends on.

    Attributes:
        signature: The task; its fields name the rows' columns.
        train: Rows to train on: a .jsonl file, or the rows.
        dev: Rows to validate on; None holds out a tenth of ``train``, at most 200 rows, the same whatever ``seed``.
        output_dir: The run's folder. The adapter lands in ``output_dir/adapter``.
        name: The domain: it marks console lines and names the adapter in the registry.
        base: Base model: a Hugging Face id, a folder, or None for the bundled seedling.
        adapter: DSPy adapter that inference will use; None is ``dspy.ChatAdapter()``.
        demos: Few-shot examples that inference will show too.
        parent: Folder of the adapter whose weights the run starts from, of the shape that the other settings say; None
            starts from a fresh LoRA.
        full_finetune: Whether all weights train instead of an adapter; the model lands in ``output_dir/model``. Give it
            about a tenth of an adapter's learning rate.
        qlora: Whether the frozen base is held in 4 bit (bitsandbytes); the next three say how, named as in
            ``transformers.BitsAndBytesConfig``.
        epochs: Passes over the rows, with their noisy copies; counts only where ``max_steps`` is None. Given without
            ``max_steps`` to ``dspy-lora train`` or as ``train_kwargs``, it takes the place of the configured steps.
        batch_size: Rows in one optimizer step.
        micro_batch_size: Most rows in one forward pass of a base with at least 500 million parameters; its largest
            divisor of ``batch_size`` is taken.
        gradient_checkpointing: Whether such a base recomputes activations to save memory.
        warmup_ratio: Share of the steps over which the learning rate rises, rounded down to whole steps.
        neftune_noise_alpha: Size of the uniform noise on the embeddings while training (NEFTune, Jain et al. 2023,
            arXiv 2310.05914); None adds none.
        prompt_loss_weight: Weight of a prompt's token in the training loss, a completion's having 1 (Shi et al. 2024,
            arXiv 2405.14394, train on both alike); 0 leaves prompts out. Helps where rows are few and answers short.
            The sum is divided by the number of the completions' tokens.
        noisy_copies: Noisy copies of each training row to train on beside it, for tasks whose answer does not hang on
            single words of the input (training/noise.py).
        dtype: Number format of the base while training; "auto" is bfloat16 on a GPU that has it, else float32. LoRA
            weights are float32 in any case.
        max_length: Longest row in tokens; longer ones are left out and counted. The base's own limit comes first.
        eval_rows: Validation rows that are answered, drawn from all, the same whatever ``seed`` (all of them count in
            the validation loss).
        eval_every: Steps between validations, each with a checkpoint to go on from; None is a tenth of all steps.
        select_by: What the best checkpoint is best at.
        patience: Validations in a row without a lower validation loss after which the run stops; None never stops it.
        adapter_dtype: Number format of the saved weights, a whole copy's too; final figures are measured after rounding
            to it.
        report_to: Trackers, which must be installed, that the trainer reports to beside ``metrics.jsonl``.
        registry: Where to publish the adapter; None does not publish it.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    signature: Any
    train: Path | list[Row]
    output_dir: Path
    dev: Path | list[Row] | None = None
    name: str = "adapter"
    base: str | None = None
    adapter: Any = None
    demos: list[Row] = []
    r: int = pydantic.Field(default=16, gt=0)
    lora_alpha: int = pydantic.Field(default=32, gt=0)
    lora_dropout: float = pydantic.Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = SEVEN_PROJECTIONS
    use_rslora: bool = True
    use_dora: bool = False
    parent: Path | None = None
    full_finetune: bool = False
    qlora: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    learning_rate: float = pydantic.Field(default=3e-4, gt=0)
    weight_decay: float = pydantic.Field(default=1e-5, ge=0)
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = pydantic.Field(default=0.03, ge=0, lt=1)
    optim: str = "adamw_torch"
    max_steps: int | None = pydantic.Field(default=None, gt=0)
    epochs: float = pydantic.Field(default=3.0, gt=0)
    batch_size: int = pydantic.Field(default=32, gt=0)
    micro_batch_size: int = pydantic.Field(default=8, gt=0)
    gradient_checkpointing: bool = True
    torch_compile: bool = False
    neftune_noise_alpha: float | None = pydantic.Field(default=None, gt=0)
    prompt_loss_weight: float = pydantic.Field(default=0.0, ge=0, le=1)
    noisy_copies: int = pydantic.Field(default=0, ge=0)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_length: int = pydantic.Field(default=1024, gt=1)
    seed: int = pydantic.Field(default=0, ge=0)
    eval_rows: int = pydantic.Field(default=200, gt=0)
    eval_every: int | None = pydantic.Field(default=None, gt=0)
    eval_batch_size: int = pydantic.Field(default=64, gt=0)
    select_by: Literal["exact_match", "loss"] = "exact_match"
    patience: int | None = pydantic.Field(default=None, gt=0)
    adapter_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    report_to: tuple[Literal["mlflow", "tensorboard"], ...] = ()
    registry: Path | None = None
    quiet: bool = False

    @pydantic.model_validator(mode="after")
    def _can_be_published(self) -> "TrainConfig":
        if self.use_dora and self.registry is not None:
            raise ValueError(
                "vLLM serves no DoRA, so use_dora and registry (--publish) do not go together. Train without "
                f"publishing, then make a plain LoRA or a merged base of {self.output_dir / 'adapter'} with "
                "`dspy-lora merge`"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _copy_is_whole(self) -> "TrainConfig":
        others = {
            "qlora": self.qlora,
            "use_dora": self.use_dora,
            "parent": self.parent is not None,
            "registry (--publish)": self.registry is not None,
        }
        if self.full_finetune and any(others.values()):
            named = ", ".join(name for name, is_set in others.items() if is_set)
            raise ValueError(
                f"full_finetune makes a model, not an adapter, and does not go together with {named}. Leave that out "
                "(--no-qlora, --no-use-dora)"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """The settings as JSON-safe values; rows in memory are left out, the task is spelled out."""
        values = self.model_dump(mode="json", exclude={"signature", "adapter", "train", "dev"})
        files = {key: str(rows) for key in ("train", "dev") if isinstance(rows := getattr(self, key), Path)}
        return values | files | {"signature": _task(self.signature), "adapter": type(self.chat_adapter()).__name__}

    def chat_adapter(self) -> "dspy.Adapter":
        """The DSPy adapter that renders and parses."""
        import dspy

        return self.adapter or dspy.ChatAdapter()


def _task(signature: "type[dspy.Signature]") -> dict[str, Any]:
    """A task as DSPy's adapters write it into a prompt: fields, their types and descriptions, instructions."""
    from dspy.adapters.utils import get_annotation_name

    described = {
        name: {"type": get_annotation_name(field.annotation), "description": field.json_schema_extra["desc"]}
        for name, field in signature.fields.items()
    }
    return {"fields": signature.signature, "instructions": signature.instructions, "described": described}


def of_the_base(config: Config) -> dict[str, Any]:
    """What ``lora_config.yaml`` says of loading the base, by the names in TrainConfig and GRPOSettings."""
    dtype = "auto" if config.training.bf16 else "float32"
    return config.qlora.model_dump(exclude={"enabled"}) | {"qlora": config.qlora.enabled, "dtype": dtype}


def problems(error: pydantic.ValidationError) -> str:
    """Words what pydantic found; a problem of several settings together has no place and no value of its own."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))} = {each['input']!r}: {each['msg']}"
        if each["loc"]
        else each["msg"].removeprefix("Value error, ")
        for each in error.errors()
    )


def over_configured(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Lays what the user gave over the configuration, whose ``max_steps`` would otherwise hide ``epochs``."""
    counted = {"max_steps": None} if "epochs" in given else {}
    return found | counted | given
