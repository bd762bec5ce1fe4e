"""What ``lora_config.yaml`` may say, and where each setting comes from.

First wins: an argument, an environment variable (``DSPY_LORA_*``), ``lora_config.yaml`` in the working directory, the
packaged ``lora_config.yaml`` (which names every key and its default; the models here say what is allowed).
"""

import dataclasses
import keyword
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, StringConstraints

from dspy_lora.errors import ConfigError, UnknownDomainError, near
from dspy_lora.layers import Key, Layer, Loader, read_yaml

if TYPE_CHECKING:
    import dspy

PACKAGED = Path(__file__).with_name("lora_config.yaml")
FILE_NAME = "lora_config.yaml"
ENV_PREFIX = "DSPY_LORA_"
API_KEY_VARIABLE = f"{ENV_PREFIX}API_KEY"  # of LoRALM(api_base=...): a secret, so no setting of a file

# Words that stand for something else where the name of a domain, or of its adapter, may stand: LoRALM's choice call by
# call, every adapter of `dspy-lora serve` and `train`, the model without an adapter in `dspy-lora evaluate --irt`, no
# domain in `dspy-lora route`.
TAKEN = ("all", "auto", "base", "none")

# What no field can be called: names that DSPy 3.4 and pydantic use in a signature, how others of those begin, and, for
# an input, names of arguments of dspy.Predict's methods.
_OF_SIGNATURES = ("fields", "input_fields", "instructions", "output_fields", "signature")
_BEGINNINGS = ("_", "model_config", "model_dump", "model_validate")
_OF_CALLS = ("completions", "config", "demos", "lm", "new_signature", "self")

# The ranks that vLLM preallocates slots for (vllm/config/lora.py, MaxLoRARanks).
Rank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
LARGEST_RANK: int = max(get_args(Rank))


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _domain_name(value: str) -> str:
    if value in TAKEN:
        raise ValueError("the word stands for something else. Give the domain another name")
    return value


def check_output_field(name: str) -> str:
    """Returns a name that an output of a signature can have.

    Raises:
        ConfigError: No identifier, or a name that DSPy keeps for itself.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"a field name is a Python identifier, and {name!r} is none")
    if name in _OF_SIGNATURES or name.startswith(_BEGINNINGS):
        raise ConfigError(f"DSPy keeps {name!r} for itself. Give the field another name")
    return name


def check_input_field(name: str) -> str:
    """Returns a name that an input of a signature can have.

    Raises:
        ConfigError: As for an output; also a name that ``dspy.Predict`` takes for an argument of its own.
    """
    if name in _OF_CALLS:
        raise ConfigError(f"dspy.Predict takes {name!r} for an argument of its own. Give the field another name")
    return check_output_field(name)


# YAML reads 1e-5 as a string: float takes it, int stays strict so that 16.5, "16" and true are refused.
Number = Annotated[float, BeforeValidator(_not_bool)]
Whole = Annotated[int, Strict()]
Switch = Annotated[bool, Strict()]
Positive = Annotated[Whole, Field(gt=0)]
InputName = Annotated[str, AfterValidator(check_input_field)]
OutputName = Annotated[str, AfterValidator(check_output_field)]
DomainName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}\z"), AfterValidator(_domain_name)]


class _Section(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSection(_Section):
    """``lora``: the adapter's shape, named as in ``peft.LoraConfig``."""

    r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)]
    target_modules: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1)]
    bias: Literal["none"]
    use_rslora: Switch
    use_dora: Switch


class TrainingSection(_Section):
    """``training``: named as in ``transformers.TrainingArguments``."""

    weight_decay: Annotated[Number, Field(ge=0)]
    learning_rate: Annotated[Number, Field(gt=0)]
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adafactor",
        "sgd",
    ]
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)]
    bf16: Switch
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    gradient_checkpointing: Switch
    max_steps: Positive
    max_length: Positive
    neftune_noise_alpha: Annotated[Number, Field(gt=0)] | None
    prompt_loss_weight: Annotated[Number, Field(ge=0, le=1)]
    noisy_copies: Annotated[Whole, Field(ge=0)]
    patience: Positive | None
    seed: Annotated[Whole, Field(ge=0)]


class QloraSection(_Section):
    """``qlora``: training over a 4-bit base, named as in ``transformers.BitsAndBytesConfig``."""

    enabled: Switch
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: Switch
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"]


class ServingConfig(_Section):
    """``serving``: the engine's settings; None leaves the choice to the engine room."""

    max_loras: Positive | None
    max_lora_rank: Rank | None
    max_cpu_loras: Positive | None
    max_model_len: Positive | None
    max_num_seqs: Positive | None
    max_num_batched_tokens: Positive | None
    tensor_parallel_size: Positive | None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1)] | None
    enforce_eager: Switch | None
    enable_prefix_caching: Switch | None
    trust_remote_code: Switch
    kv_cache_gib: Annotated[Number, Field(gt=0)]
    tool_parser: str | None
    reasoning_parser: str | None
    start_timeout_s: Annotated[Number, Field(gt=0)]

    _rank_is_a_number = pydantic.field_validator("max_lora_rank", mode="before")(_not_bool)

    @pydantic.model_validator(mode="after")
    def _cpu_slots_hold_a_batch(self) -> "ServingConfig":
        if self.max_cpu_loras is not None and self.max_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) is below max_loras ({self.max_loras})")
        return self


class DomainSection(_Section):
    """One entry of ``domains``: its task, and what it sets differently (None: as ``lora`` and ``training`` say)."""

    task: Annotated[str, StringConstraints(min_length=1)]
    input_field: InputName = "text"
    output_field: OutputName = "label"
    input_description: str = ""
    output_description: str = ""
    data: str | None = None
    r: Positive | None = None
    lora_alpha: Positive | None = None
    weight_decay: Annotated[Number, Field(ge=0)] | None = None
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    max_steps: Positive | None = None

    @pydantic.model_validator(mode="after")
    def _fields_differ(self) -> "DomainSection":
        if self.input_field == self.output_field:
            raise ValueError(f"input_field and output_field are both {self.input_field!r}")
        return self


@dataclasses.dataclass(frozen=True)
class DomainConfig:
    """A domain with its overrides folded into ``lora`` and ``training``.

    Attributes:
        name: The domain, and its adapter's name in the registry.
        task: The instruction of its signature.
        data: Folder of train.jsonl, dev.jsonl and test.jsonl inside a data folder; None where none is configured.
    """

    name: str
    task: str
    input_field: str
    output_field: str
    input_description: str
    output_description: str
    data: str | None
    r: int
    lora_alpha: int
    weight_decay: float
    learning_rate: float
    max_steps: int

    def signature(self) -> "type[dspy.Signature]":
        """The signature that training, evaluation and serving share.

        Without descriptions it prompts exactly as ``dspy.Signature("text -> label", task)`` does.
        """
        import dspy

        described = {"input": self.input_description, "output": self.output_description}
        desc = {side: {"desc": text} if text else {} for side, text in described.items()}
        fields = {
            self.input_field: (str, dspy.InputField(**desc["input"])),
            self.output_field: (str, dspy.OutputField(**desc["output"])),
        }
        return dspy.Signature(fields, self.task)


class Config(_Section):
    """All settings; see ``load_config``."""

    base_model: str | None
    registry: str | None
    lora: LoraSection
    training: TrainingSection
    qlora: QloraSection
    serving: ServingConfig
    domains: dict[DomainName, DomainSection]

    def domain(self, name: str) -> DomainConfig:
        """The domain's settings, its overrides folded in.

        Raises:
            UnknownDomainError: No such domain; the message names the near ones.
        """
        if name not in self.domains:
            hint = "A new domain is an entry of `domains` in lora_config.yaml with a `task` sentence."
            raise UnknownDomainError(f"no domain {name!r} is configured. {near(name, self.domains)} {hint}")
        chosen = self.domains[name].model_dump(exclude_none=True)
        general = self.lora.model_dump(include={"r", "lora_alpha"})
        general |= self.training.model_dump(include={"weight_decay", "learning_rate", "max_steps"})
        return DomainConfig(**{"name": name, "data": None} | general | chosen)


def load_config(path: str | Path | None = None) -> Config:
    """Loads the settings: the packaged file, under the user's file, under the environment.

    Args:
        path: The user's file; None takes ``lora_config.yaml`` in the working directory where there is one.

    Returns:
        The validated settings.

    Raises:
        ConfigError: A file that cannot be read, an unknown key or a value that is not allowed; the message names the
            key, its file and line or environment variable, and the nearest allowed word.
    """
    layer = read_yaml(PACKAGED)
    if path is not None or Path(FILE_NAME).is_file():
        layer = layer.under(read_yaml(Path(path or FILE_NAME)))
    layer = layer.under(_environment(os.environ))
    try:
        return Config.model_validate(layer.values)
    except pydantic.ValidationError as exc:
        raise ConfigError("; ".join(_explain(problem, layer.origins) for problem in exc.errors())) from exc


def _environment(variables: Mapping[str, str]) -> Layer:
    """Reads ``DSPY_LORA_<KEY>`` and ``DSPY_LORA_<SECTION>__<KEY>``; an empty variable counts as not set."""
    layer = Layer({}, {})
    for name in sorted(variables):
        if not name.startswith(ENV_PREFIX) or name == API_KEY_VARIABLE or not variables[name]:
            continue
        key = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        value = _env_value(name, variables[name], key)
        for word in reversed(key):
            value = {word: value}
        origin = f"environment variable {name}"
        layer = layer.under(Layer(value, {key[:depth]: origin for depth in range(1, len(key) + 1)}))
    return layer


def _env_value(name: str, text: str, key: Key) -> Any:
    """A variable's value: the text itself where a text is wanted, YAML (``true``, ``12``, ``[a, b]``) elsewhere."""
    field = _fields(key[:-1]).get(key[-1])
    if field is None or str in _alternatives(field.annotation):
        return text
    try:
        return Loader(text).get_single_data()
    except yaml.YAMLError as exc:
        raise ConfigError(f"environment variable {name}: {text!r} is not YAML") from exc


def _fields(section: Key) -> dict[str, Any]:
    """The fields allowed in a section; none for a place that is not a section."""
    match section:
        case ():
            return dict(Config.model_fields)
        case ("domains", _):
            return dict(DomainSection.model_fields)
        case (name,) if name in Config.model_fields and name not in ("base_model", "registry", "domains"):
            model: type[pydantic.BaseModel] = Config.model_fields[name].annotation  # type: ignore[assignment]
            return dict(model.model_fields)
    return {}


def _alternatives(annotation: Any) -> list[Any]:
    """The types or literal values that an annotation allows: ``Literal["a", "b"] | None`` gives a, b and NoneType."""
    inner = () if get_origin(annotation) is list else get_args(annotation)
    return [leaf for part in inner for leaf in _alternatives(part)] if inner else [annotation]


def _explain(problem: Any, origins: dict[Key, str]) -> str:
    """One problem that pydantic found, in words: where it stands, which key, what is wrong, what is allowed."""
    key: Key = tuple(str(part) for part in problem["loc"])
    origin = next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), str(PACKAGED))
    dotted = ".".join(key)
    match problem["type"]:
        case "extra_forbidden":
            return f"{origin}: {dotted} is not a setting. {near(key[-1], _fields(key[:-1]))}"
        case "missing":
            packaged = near(key[1], read_yaml(PACKAGED).values["domains"])
            return f"{origin}: {dotted} is missing: a new domain needs it. {packaged}"
        case "literal_error":
            words = [str(word) for word in _alternatives(_fields(key[:-1])[key[-1]].annotation)]
            allowed = near(str(problem["input"]), [word for word in words if not word.startswith("<class")])
            return f"{origin}: {dotted} = {problem['input']!r} is not allowed. {allowed}"
        case _:
            value = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
            return f"{origin}: {dotted}{value} is not allowed: {problem['msg'].removeprefix('Value error, ')}"
