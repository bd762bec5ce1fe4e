"""What a run trains: the base model, whole or in 4 bit, its tokenizer, and the adapter's shape."""

from typing import Any

from dspy_lora.adapters.base import Base
from dspy_lora.errors import MissingDependencyError
from dspy_lora.training.settings import TrainConfig

_BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # optimizers that it brings


def require_packages(config: TrainConfig) -> None:
    """Checks that what the run needs is installed.

    Raises:
        MissingDependencyError: Something is not; the message names the command.
    """
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401

        if config.qlora or config.optim in _BITSANDBYTES:
            import bitsandbytes  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            f"training needs {exc.name!r}, which is not installed. Run: pip install 'dspy-lora[train]'"
        ) from exc
    from transformers.integrations import is_mlflow_available, is_tensorboard_available

    installed = {"mlflow": is_mlflow_available, "tensorboard": is_tensorboard_available}
    for tracker in config.report_to:
        if not installed[tracker]():
            raise MissingDependencyError(
                f"report_to={tracker!r} needs {tracker}, which is not installed. Run: pip install {tracker}"
            )


def load_base(config: TrainConfig, base: Base) -> tuple[Any, Any]:
    """Loads model and tokenizer; the tokenizer gets a padding token where it has none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and _gpu_has_bfloat16())
    dtype = torch.bfloat16 if half else torch.float32
    quantization = _four_bit(config) if config.qlora else None
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype, quantization_config=quantization)
    if config.qlora:
        _keep_differentiable(model)
    return model, tokenizer


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _four_bit(config: TrainConfig) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype,
    )


def _keep_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first validation.

    On a CPU with AVX512-BF16 its Linear4bit packs them for inference as soon as it runs in eval mode, for good, and the
    kernel for packed weights has no backward pass: training would go on with wrong gradients (bitsandbytes 0.50,
    nn/modules.py).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(config: TrainConfig) -> Any:
    """The adapter's shape as PEFT takes it."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        bias="none",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )


def kind(config: TrainConfig) -> str:
    """What the adapter is called: ``rsLoRA + DoRA over a 4-bit base (nf4)``."""
    name = ("rsLoRA" if config.use_rslora else "LoRA") + (" + DoRA" if config.use_dora else "")
    return f"{name} over a 4-bit base ({config.bnb_4bit_quant_type})" if config.qlora else name
