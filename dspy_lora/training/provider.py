"""LoRALM's provider for DSPy: what ``dspy.BootstrapFinetune`` and ``dspy.BetterTogether`` train through."""

import hashlib
import json
import logging
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pydantic
from dspy.clients.provider import Provider
from dspy.clients.utils_finetune import TrainDataFormat, get_finetune_directory

from dspy_lora.adapters.base import Base, fetch_base
from dspy_lora.adapters.registry import AdapterRegistry, Revision
from dspy_lora.adapters.revision import check_new_name
from dspy_lora.config import Config, DomainSection, load_config
from dspy_lora.engine.client import free_gpu
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import ConfigError, DataError, near
from dspy_lora.training import data
from dspy_lora.training.chats import ChatConfig, chat_rows
from dspy_lora.training.data import Row
from dspy_lora.training.jobs import LoRATrainingJob
from dspy_lora.training.publishing import publish_run
from dspy_lora.training.settings import over_configured, problems
from dspy_lora.training.shape import check_rank, differing, shape_of

logger = logging.getLogger(__name__)

NAME = "adapter"
FROM_PARENT = "from_parent"
FOLDER = "output_dir"
ROWS_FILE = "chats.jsonl"

# What the provider sets itself, or DSPy's data have settled. Noise is for input fields, which chats no longer have.
_NO_SETTINGS = frozenset(
    "signature train dev name base adapter demos registry parent full_finetune noisy_copies output_dir".split()
)
_SETTINGS = ChatConfig.model_fields.keys() - _NO_SETTINGS
_LONGEST_STEM = 55  # a name has at most 64 characters, and the data's hash takes nine
_HASHED = re.compile(r"-[0-9a-f]{8}$")


class LoRAProvider(Provider):
    """Trains adapters for the LMs of one base model and publishes them to one registry.

    ``train_kwargs`` are settings of ``TrainConfig`` (``learning_rate``, ``max_steps``, ``r``, ``batch_size``,
    ``seed``...); what is not given comes from ``lora_config.yaml``, and from its domain of the adapter's name where
    there is one. Three more say where the adapter comes from and goes:

        adapter: Its name in the registry; left out, the parent's name (``base`` without one) and a hash of the data.
        from_parent: Whether training goes on from the weights of the LM's adapter, which keeps its shape (the default),
            or starts from a fresh LoRA over the base model.
        output_dir: Where the run's folder lands; left out, DSPy's own place (``DSPY_FINETUNEDIR``).

    Args:
        base: The base model.
        registry: Where adapters are published.
        engine: Settings of the engine that serves them; None where a server does.
    """

    def __init__(self, base: Base, registry: AdapterRegistry, engine: EngineSettings | None) -> None:
        super().__init__()
        self.finetunable = True
        self.reinforceable = True
        self.TrainingJob = LoRATrainingJob
        self.ReinforceJob = _reinforce_job
        self._base = base
        self._registry = registry
        self._engine = engine

    @staticmethod
    def is_provider_model(model: str) -> bool:
        """Whether a model string is a LoRALM's."""
        return model.startswith("lora/")

    def finetune(
        self,
        job: LoRATrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Trains an adapter in a process of its own and publishes it; DSPy calls this in the job's thread.

        A job that equals an earlier one (its data, settings and parent) takes over that one's run: finished, it is
        published again, which changes nothing; stopped, it goes on.

        Args:
            job: Runs it, shows where it stands, and cancels it.
            model: Model string of the LM that is trained.
            train_data: Chats, ``{"messages": [...]}`` each.
            train_data_format: ``TrainDataFormat.CHAT``.
            train_kwargs: See the class.

        Returns:
            The model string of the published revision; ``lm.copy(model=...)`` binds to it.

        Raises:
            ConfigError: A keyword argument that is unknown or not allowed.
            DataError: No chats, malformed ones, or another format.
            AdapterError: The parent cannot be trained further, or the new adapter cannot be served.
            TrainingError: The run failed or was cancelled.
            PublishError: The disk refused; the run itself is finished.
        """
        if train_data_format != TrainDataFormat.CHAT:
            raise DataError(
                f"train_data_format={train_data_format!r}: LoRALM is trained on chats (TrainDataFormat.CHAT). "
                "Use dspy.ChatAdapter for fine-tuning."
            )
        rows, parent = chat_rows(train_data), self._parent(model)
        lineage: dict[str, Any] = {
            "program": [{"system": text, "chats": count} for text, count in _tasks(rows).most_common()],
            "parent": parent.ref if parent else None,
            "data": data.sha256(rows),
        }
        config = self._config(dict(train_kwargs or {}), parent, lineage["data"])
        check_rank(config.r, self._engine)
        lineage["started_from_parent"] = config.parent is not None
        _write_rows(rows, config.output_dir / ROWS_FILE)
        logger.info("%s: training on %d chats of %d predictors", config.name, len(rows), len(lineage["program"]))
        folder = job.train(config, free_gpu)
        revision = publish_run(folder, self._registry.root, config.name, lineage=lineage)
        return f"{self._model(None)}/{revision.ref}"

    def _model(self, ref: str | None) -> str:
        name = f"lora/{self._base.name}@{self._base.revision}"
        return f"{name}/{ref}" if ref else name

    def _parent(self, model: str) -> Revision | None:
        """The adapter of a model string."""
        name, _, ref = model.partition(f"{self._model(None)}/")
        if model == self._model(None):
            return None
        if name or not ref:
            raise ConfigError(f"{model!r} is no model of base {self._model(None)!r}. Leave finetuning_model out.")
        if ref.split("@")[0] == "auto":
            raise ConfigError("LoRALM(domain='auto') has no weights of its own. Train LoRALM(domain=NAME) or LoRALM().")
        return self._registry.resolve(ref)

    def _config(self, given: dict[str, Any], parent: Revision | None, sha256: str) -> ChatConfig:
        """The run's settings: what was given, over the parent's shape, over the configuration."""
        base = fetch_base(self._base.name)  # else the same run had another folder once it is there
        name = check_new_name(given.pop(NAME, None) or _default_name(parent, sha256))
        parent = parent if given.pop(FROM_PARENT, True) else None
        root = Path(given.pop(FOLDER, None) or get_finetune_directory())
        settings = over_configured(_defaults(load_config(), name), _settings(given, parent))
        decides = {key: value for key, value in settings.items() if key != "quiet"}
        decides |= {"base": base.revision, "parent": parent.ref if parent else None, "data": sha256}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
        folder = root / f"{name}-{digest[:12]}"  # equal runs share it
        try:
            return ChatConfig(
                name=name,
                train=folder / ROWS_FILE,
                output_dir=folder,
                base=self._base.name,
                parent=parent.path if parent else None,
                registry=self._registry.root,
                **settings,
            )
        except pydantic.ValidationError as exc:
            raise ConfigError(f"train_kwargs: {problems(exc)}") from exc


def _reinforce_job(lm: Any, train_kwargs: dict[str, Any] | None = None) -> Any:
    """Makes the job of ``dspy.GRPO``; its module is imported only here."""
    from dspy_lora.training.reinforce import LoRAReinforceJob

    return LoRAReinforceJob(lm=lm, train_kwargs=train_kwargs)


def _tasks(rows: list[Row]) -> Counter[str]:
    """How many chats each predictor's system message opens."""
    first = (row["chat"][0] for row in rows)
    return Counter(message["content"] if message["role"] == "system" else "" for message in first)


def _default_name(parent: Revision | None, sha256: str) -> str:
    stem = _HASHED.sub("", parent.adapter) if parent else "base"
    return f"{stem[:_LONGEST_STEM]}-{sha256[:8]}"


def _settings(given: dict[str, Any], parent: Revision | None) -> dict[str, Any]:
    """What the caller and the parent settle.

    Raises:
        ConfigError: An unknown setting, or one that is not the parent's.
    """
    for key in given:
        if key not in _SETTINGS:
            known = _SETTINGS | {NAME, FROM_PARENT, FOLDER}
            raise ConfigError(f"train_kwargs[{key!r}] is no setting. {near(key, known)}")
    if parent is None:
        return given
    shape = shape_of(parent.path, parent.ref)
    if other := differing(given, shape):
        raise ConfigError(
            f"train_kwargs[{other!r}] = {given[other]!r}, but the adapter that training goes on from, {parent.ref!r}, "
            f"has {shape[other]!r}. Leave it out, or set from_parent=False."
        )
    return given | shape


def _defaults(config: Config, name: str) -> dict[str, Any]:
    """The settings that ``dspy-lora train`` takes from ``lora_config.yaml``, for a name that need be no domain."""
    from dspy_lora.training.command import configured

    if name not in config.domains:
        config = config.model_copy(update={"domains": {name: DomainSection(task="chats")}})
    found = configured(config, config.domain(name))
    return {key: value for key, value in found.items() if key in _SETTINGS}


def _write_rows(rows: list[Row], file: Path) -> None:
    """Writes the rows of a run in one step: a run of an equal job may be reading them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{threading.get_ident()}")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(file)
