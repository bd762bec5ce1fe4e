"""An adapter that is to be merged: where it lies, which base it is for, how it was trained."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_lora.adapters.base import ABSENT, Base, fetch_base, resolve_base
from dspy_lora.adapters.checks import WEIGHTS_FILE, read_metadata
from dspy_lora.adapters.peft_config import CONFIG_FILE, read_json, refuse
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.adapters.revision import content_hash
from dspy_lora.adapters.weights import read_header
from dspy_lora.config import load_config
from dspy_lora.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    import dspy

# Initialisations that took a part out of the base's weights which cannot be found again from the base alone: a random
# projection (two seeds of pissa_niter_16 leave weights that differ by 23 % on the seedling), calibration data, 4 bit,
# gradients.
_LOST_INITS = ("pissa_niter", "corda", "lora_ga", "loftq")
_PACKAGES = ("dspy-lora", "peft", "torch", "transformers")


@dataclass(frozen=True)
class Source:
    """An adapter as it was given.

    Attributes:
        name: As it was asked for: a folder, or a reference of the registry.
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
        revision: First 12 hex digits of the SHA-256 over both, as in the registry.
        config: What ``adapter_config.json`` holds.
        metadata: What training recorded.
        base_name: Name of the base that it was trained on; a hint only. None where nothing says so.
        base_revision: That base's revision; None where it was not recorded.
    """

    name: str
    folder: Path
    revision: str
    config: dict[str, Any]
    metadata: dict[str, Any]
    base_name: str | None
    base_revision: str | None

    @property
    def dtype(self) -> str:
        """Number format of its weights, as torch names it; float32 where there are several."""
        kinds = {tensor.dtype for tensor in read_header(self.folder / WEIGHTS_FILE).values()}
        return {"BF16": "bfloat16", "F16": "float16"}[kinds.pop()] if kinds in ({"BF16"}, {"F16"}) else "float32"

    @property
    def in_4_bit(self) -> bool:
        """Whether its training recorded a base in 4 bit (QLoRA)."""
        qlora = self.metadata.get("config", {}).get("qlora")
        return bool(qlora.get("enabled", True) if isinstance(qlora, dict) else qlora)

    @property
    def task(self) -> dict[str, Any] | None:
        """The signature that its training recorded; None where it recorded none."""
        task = self.metadata.get("config", {}).get("signature")
        return task if isinstance(task, dict) else None

    def touches(self, module: str) -> bool:
        """Whether it has tensors of a module of that name. Trained tokens do not count: PEFT ties theirs itself."""
        names = (f".{name}" for name in read_header(self.folder / WEIGHTS_FILE) if ".token_adapter." not in name)
        return any(f".{module}." in name for name in names)

    def signature(self) -> "type[dspy.Signature]":
        """The task that its training recorded, else ``question -> answer``."""
        import dspy

        if task := self.task:
            return dspy.Signature(task["fields"], task["instructions"])
        return dspy.Signature("question -> answer")

    def lineage(self) -> dict[str, Any]:
        """What a result's metadata says about this parent."""
        return {"adapter": self.name, "revision": self.revision, "base": self.base_revision, "metadata": self.metadata}


def find_source(adapter: str | Path, registry: AdapterRegistry) -> Source:
    """Finds an adapter: a folder that holds one, else a name or reference in the registry.

    Raises:
        AdapterError: It is damaged, no LoRA, or of a kind whose change of the base cannot be found again.
        UnknownAdapterError: Neither a folder nor in the registry.
    """
    folder = Path(adapter).expanduser()
    if (folder / CONFIG_FILE).is_file():
        metadata = read_metadata(folder)
        name, base_name, base_revision = str(adapter), None, metadata.get("base_revision")
    else:
        if folder.is_dir():
            refuse(folder, f"there is no {CONFIG_FILE}. Give a folder that PEFT's save_pretrained wrote.")
        if not isinstance(adapter, str) or "/" in adapter:
            raise AdapterError(f"{adapter}: there is no such folder. Give an adapter's folder or its published name.")
        found = registry.resolve(adapter)
        folder, metadata = found.path, found.metadata
        name, base_name, base_revision = found.ref, found.base_name, found.base
    config = read_json(folder / CONFIG_FILE)
    _check(folder, config)
    return Source(
        name=name,
        folder=folder,
        revision=content_hash(folder),
        config=config,
        metadata=metadata,
        base_name=base_name or config.get("base_model_name_or_path"),
        base_revision=None if base_revision == ABSENT else base_revision,
    )


def _check(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        refuse(folder, f"{CONFIG_FILE} says peft_type {config.get('peft_type')!r}; only 'LORA' can be merged.")
    if config.get("layer_replication"):
        refuse(
            folder,
            "it uses layers of the base several times (layer_replication), with other changes each time, which the "
            "base's weights cannot hold. Train again without layer_replication.",
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_LOST_INITS):
        refuse(
            folder,
            f"init_lora_weights {init!r} took a part out of the base's weights that cannot be found again from the "
            "base alone. Where it was trained, save it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...).",
        )
    if not (folder / WEIGHTS_FILE).is_file():
        refuse(
            folder, f"there is no {WEIGHTS_FILE}. Give a folder that PEFT's save_pretrained wrote; no pickle is read."
        )
    try:
        read_header(folder / WEIGHTS_FILE)
    except (OSError, ValueError) as exc:
        refuse(folder, f"{WEIGHTS_FILE} cannot be used: {exc}. Copy or save the adapter again.")


def common_base(sources: Sequence[Source], model: str | None) -> Base:
    """The base that all adapters are for.

    Args:
        sources: The adapters.
        model: The base as the user names it; None takes the configuration's, else the one that the first adapter names.

    Raises:
        AdapterError: They are for different bases, or for another than the one named.
        ConfigError: No such base, one that cannot be downloaded, or one whose stored weights are quantised.
    """
    base = fetch_base(model or load_config().base_model or sources[0].base_name)
    revisions = {source.name: source.base_revision or _hinted(source, model) for source in sources}
    if any(revision not in (None, base.revision) for revision in revisions.values()):
        listed = ", ".join(f"{name!r} for base {revision or 'unknown'}" for name, revision in revisions.items())
        raise AdapterError(
            f"the adapters are not for base {base.name!r} at {base.revision}: {listed}. An adapter is merged with its "
            "own base, and with adapters of that base: name it with --base-model, or train the adapters on one base."
        )
    _check_precision(base)
    return base


def _hinted(source: Source, model: str | None) -> str | None:
    """Revision of the base that an adapter's configuration names, where the user names none and it is on this disk."""
    if model is not None or source.base_name is None:
        return None
    try:
        hinted = resolve_base(source.base_name)
    except ConfigError:  # a folder of the machine that trained it
        return None
    return hinted.revision if hinted.folder else None


def _check_precision(base: Base) -> None:
    if base.folder is not None and "quantization_config" in read_json(base.folder / "config.json"):
        raise ConfigError(
            f"base model {base.name!r} is stored quantised, and merging writes 16-bit weights. Name the 16-bit model "
            "that it was made from with --base-model."
        )


def record(kind: str, sources: Iterable[Source], base: Base, **facts: Any) -> dict[str, Any]:
    """Metadata of a result: where it comes from and what was measured, and the task, where it is the same for all."""
    sources = list(sources)
    parents = [source.lineage() for source in sources]
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    merge = {"kind": kind, "base": base.name, "parents": parents, "versions": versions} | facts
    task = sources[0].task
    config = {"config": {"signature": task}} if task and all(source.task == task for source in sources) else {}
    return {"base_revision": base.revision, "merge": merge} | config
