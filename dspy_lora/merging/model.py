"""The base model and its adapters in memory, as transformers and PEFT load them."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from dspy_lora.adapters.base import Base
from dspy_lora.errors import AdapterError, ConfigError, MissingDependencyError
from dspy_lora.merging.source import Source


def require_packages() -> None:
    """Raises a MissingDependencyError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            f"merging needs {exc.name!r}, which is not installed. Run: pip install 'dspy-lora[train]'"
        ) from exc


def load_tokenizer(folder: Any) -> Any:
    """Loads a tokenizer; it gets a padding token where it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Any, dtype: Any = None) -> Any:
    """Loads a causal language model on the GPU where there is one.

    Args:
        folder: Its folder or id.
        dtype: Number format of its weights; None is float32. Everything is merged and compared in float32, so that
            weights are rounded once, when they are written.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_adapters(base: Base, sources: Sequence[Source]) -> Any:
    """Loads a base in float32 with adapters on it.

    Returns:
        The PeftModel; its adapters are called ``"0"``, ``"1"``, ... in the order of ``sources``, the first is active.

    Raises:
        AdapterError: An adapter does not fit the base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    model = load_model(base.path)
    peft: Any = None
    for number, source in enumerate(sources):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")
                warnings.filterwarnings("ignore", "Model with .tie_word_embeddings=True.")  # merge_in unties them
                if peft is None:
                    peft = PeftModel.from_pretrained(model, source.folder, adapter_name=str(number))
                else:
                    peft.load_adapter(source.folder, adapter_name=str(number))
        except (ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as exc:
            _reraise_out_of_memory(exc)
            raise AdapterError(
                f"{source.folder}: PEFT cannot load it on base {base.name!r}: {exc} "
                "Name the base that it was trained on with --base-model, or save it again."
            ) from exc
    return peft.eval()


def merge_in(peft: Any, source: Source) -> Any:
    """Merges the active adapter into the base's weights and takes PEFT's layers off.

    Raises:
        AdapterError: The result is not finite, or PEFT cannot merge adapters of that kind.
    """
    _untie(peft.base_model.model, source)
    try:
        return peft.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as exc:
        _reraise_out_of_memory(exc)
        raise AdapterError(f"{source.folder}: PEFT cannot merge it: {exc} Train it again without that.") from exc


def _untie(model: Any, source: Source) -> None:
    """Gives a head that shares the embeddings' weights its own, where the adapter changes one of the two alone."""
    import torch

    if not model.config.get_text_config().tie_word_embeddings or source.config.get("ensure_weight_tying"):
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(source.touches(name) for name, module in model.named_modules() if module in ends):
        shared = set(ends[0].parameters())
        for module in ends[1].modules():  # PEFT may have wrapped it
            for name, weight in module.named_parameters(recurse=False):
                if weight in shared:
                    setattr(module, name, torch.nn.Parameter(weight.detach().clone()))
        model.config.get_text_config().tie_word_embeddings = False


def _reraise_out_of_memory(exc: BaseException) -> None:
    import torch

    if isinstance(exc, torch.OutOfMemoryError):
        raise exc


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keeps the caller's random numbers, and says how to do without where the GPU's memory is too small."""
    import torch

    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    except torch.OutOfMemoryError as exc:
        raise ConfigError(
            "out of GPU memory: merging holds the base in float32. Nothing was written. Run it on the CPU: "
            f"CUDA_VISIBLE_DEVICES= dspy-lora merge ... ({exc})"
        ) from exc
