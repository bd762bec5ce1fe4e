"""An adapter's ``adapter_config.json`` as PEFT writes it, and the features in it that no engine here serves."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pydantic

from dspy_lora.errors import AdapterError

CONFIG_FILE = "adapter_config.json"

# Initialisations that leave the base's weights as they are; pissa, olora, corda, loftq and others change them while
# loading, so the adapter alone is not the whole change. vLLM (PEFTHelper._init_is_supported) takes lora_ga for one of
# them; but it subtracts its first product from the base (peft/tuners/lora/layer.py, lora_ga_init).
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_MERGE = "`dspy-lora merge` turns it into a plain LoRA or a merged base"
# Features that vLLM refuses, or ignores so that the answers are not those the adapter was trained for; with the mend.
_FEATURES = {
    "use_dora": f"DoRA, which vLLM does not serve. {_MERGE}; or train again with use_dora: false.",
    "modules_to_save": "whole modules (modules_to_save) beside LoRA. Train again without modules_to_save.",
    "lora_bias": "biases (lora_bias). Train again with lora_bias=False.",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices). Train again without them.",
    "alora_invocation_tokens": "Activated LoRA (alora_invocation_tokens). Train again without it.",
    "layer_replication": "layers of the base used several times (layer_replication). Train again without it.",
    "target_parameters": "LoRA on bare parameters (target_parameters). Train again with target_modules.",
    "use_bdlora": "block-diagonal LoRA (use_bdlora). Train again without it.",
    "use_qalora": "QALoRA (use_qalora). Train again without it.",
    "kasa_config": f"KaSA (kasa_config). {_MERGE}.",
    "arrow_config": "Arrow routing (arrow_config). Publish each expert as an adapter of its own.",
}


_Number = TypeVar("_Number", int, float)


class PeftConfig(pydantic.BaseModel):
    """The keys of ``adapter_config.json`` that decide whether and how an adapter is served."""

    peft_type: str
    r: pydantic.PositiveInt
    lora_alpha: pydantic.FiniteFloat
    target_modules: list[str] | str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, pydantic.PositiveInt] | None = None
    alpha_pattern: dict[str, pydantic.FiniteFloat] | None = None
    base_model_name_or_path: str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None

    @property
    def largest_rank(self) -> int:
        """The largest rank that a module may have."""
        return max(self.r, *(self.rank_pattern or {}).values(), 0)

    def rank(self, module: str) -> int:
        """Rank of a module, by PEFT's rule: the first pattern that ends its name at a dot, else ``r``."""
        return _of_module(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        """Alpha of a module, by the same rule."""
        return _of_module(self.alpha_pattern, module, self.lora_alpha)

    def targets(self, module: str) -> bool:
        """Whether PEFT would have put LoRA on a module of that name (full names and suffixes, or one regex)."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(names(target, module) for target in self.target_modules or ())


def _of_module(patterns: dict[str, _Number] | None, module: str, general: _Number) -> _Number:
    """The value of the first pattern that ends a module's name at a dot, else the general one."""
    matches = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matches, general)


def refuse(folder: Path, message: str) -> NoReturn:
    """Raises the error of an adapter folder."""
    raise AdapterError(f"{folder}: {message}")


def names(target: str, module: str) -> bool:
    """Whether an entry of ``target_modules`` means a module: its full name, or the end of it from a dot on."""
    return module == target or module.endswith(f".{target}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        AdapterError: There is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(path.parent, f"there is no {path.name}. Give a folder that PEFT's save_pretrained wrote.")
    except (OSError, ValueError) as exc:
        refuse(path.parent, f"{path.name} cannot be read as JSON: {exc}")
    if not isinstance(value, dict):
        refuse(path.parent, f"{path.name} holds no JSON object.")
    return value


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads ``adapter_config.json`` and refuses what vLLM does not serve.

    Raises:
        AdapterError: It is missing, malformed, or uses a feature that vLLM refuses or would ignore.
    """
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        refuse(folder, f"{CONFIG_FILE} says peft_type {raw.get('peft_type')!r}; only 'LORA' is served.")
    for key, what in _FEATURES.items():
        if raw.get(key):
            refuse(folder, f"the adapter uses {what}")
    try:
        config = PeftConfig.model_validate(raw)
        for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
            re.compile(pattern)
        if isinstance(config.target_modules, str):
            re.compile(config.target_modules)
    except pydantic.ValidationError as exc:
        problem = exc.errors()[0]
        refuse(folder, f"{CONFIG_FILE}: {problem['loc'][0]} = {problem['input']!r} is not allowed: {problem['msg']}.")
    except re.error as exc:
        refuse(folder, f"{CONFIG_FILE}: {exc.pattern!r} is no regular expression: {exc}.")
    if config.bias != "none":
        refuse(folder, f"the adapter trains biases (bias {config.bias!r}). Train again with bias: none.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        refuse(
            folder,
            f"init_lora_weights {init!r} changes the base's weights, so LoRA alone is not the whole adapter. Save it "
            f"again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...); or {_MERGE}.",
        )
    return config
