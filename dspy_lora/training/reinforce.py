"""``dspy.GRPO`` for a LoRALM: the job it steps, and the process that does the training.

DSPy samples answers with the LM and hands groups of them over; a step trains the adapter on them, publishes the result
as a revision and binds the very same LM to it, so the next answers come from it. The base stays as it is, the adapter
unmerged.
"""

import contextlib
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
import pydantic
from dspy.clients.provider import ReinforceJob
from dspy.clients.utils_finetune import TrainDataFormat, get_finetune_directory
from dspy.dsp.utils.settings import thread_local_overrides

from dspy_lora.adapters.registry import AdapterRegistry, Revision
from dspy_lora.adapters.revision import check_new_name
from dspy_lora.child import child_environment
from dspy_lora.config import load_config
from dspy_lora.engine.failures import ending, last_lines
from dspy_lora.engine.local import LocalEngine
from dspy_lora.engine.processes import kill_group
from dspy_lora.errors import ConfigError, DataError, DivergedError, MissingDependencyError, TrainingError, near
from dspy_lora.training.grpo.settings import GRPOSettings
from dspy_lora.training.grpo.trainer import Group
from dspy_lora.training.settings import of_the_base, problems
from dspy_lora.training.shape import check_rank

if TYPE_CHECKING:
    from dspy_lora.lm import LoRALM

logger = logging.getLogger(__name__)

LOG_FILE = "trainer.log"

# Batches asked for at once. DSPy makes copies of a step's groups until all are served, and what it cannot hand over
# now it hands over one step late: so more are asked for than a step has groups, and the copies are dropped here.
_BATCHES = 256

_SUFFIX = "-grpo"
_LONGEST_STEM = 59  # a name has at most 64 characters

# dspy.GRPO remembers the ids it has served from one compile to the next, so no job may use another job's.
_batch_ids = itertools.count()

# What the adapter that training starts from has decided.
_SHAPE = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}

# What decides how likely an answer was, and where it was cut off.
_SAMPLING = ("temperature", "max_tokens")

_ERRORS = {error.__name__: error for error in (ConfigError, DataError, DivergedError, MissingDependencyError)}


class LoRAReinforceJob(ReinforceJob):
    """A GRPO run over one LoRALM; see ``GRPOSettings`` for what ``train_kwargs`` may set.

    Args:
        lm: The LM to train: its adapter goes on, the base alone gets a fresh one. Its temperature must not be 0.
        train_kwargs: Settings.
    """

    lm: "LoRALM"

    def __init__(self, lm: "LoRALM", train_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(lm, train_kwargs)
        self.checkpoints: dict[str, str] = {}
        self.last_checkpoint: str | None = None
        self._status = "created"
        self._steps = 0
        self._pending: list[int] = []
        self._trained: list[Any] = []  # the groups of the last step, to know their copies by
        self._process: TrainerProcess | None = None
        self._latest: Revision | None = None

    # -- what dspy.GRPO calls --------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Starts the trainer and loads the base and the adapter into it.

        Raises:
            ConfigError: A setting is not allowed, the LM is greedy, or ``domain="auto"``.
            TrainingError: The trainer did not come up.
        """
        self.settings = _settings(self.lm, self.train_kwargs)
        self._name = check_new_name(self.settings.adapter or _default_name(self.lm.domain))
        self._home = self.lm.asked_registry
        self._target, self._parent = self.lm.registry, self.lm.adapter
        root = Path(self.settings.output_dir or get_finetune_directory()).absolute()
        root.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self._name}-", dir=root))
        self._staging = AdapterRegistry(self.folder / "adapters")
        self._process = TrainerProcess(self.folder / LOG_FILE)
        try:
            self._turns = self._process.has_cuda and _shares_gpu(self.lm, self.settings)
            self._make_room()
            self._process.ask(
                "load",
                settings=self.settings.model_dump(mode="json"),
                base=vars(self.lm.base),
                parent=str(self._parent.path) if self._parent else None,
                temperature=self.lm.kwargs["temperature"],
                max_tokens=self.lm.kwargs["max_tokens"],
                folder=str(self.folder),
                turns=self._turns,
            )
        except BaseException:
            self.cancel()
            raise
        self._release = _format_as_sampled(self)
        self._status = "running"
        self._ask_for_batches()

    def step(self, train_data: list[dict[str, Any]], train_data_format: TrainDataFormat | str | None = None) -> None:
        """Trains on groups of answers and binds the LM to the revision that comes out.

        Args:
            train_data: ``{"batch_id": int, "group": [{"messages", "completion", "reward"}]}``, one a group.
            train_data_format: ``TrainDataFormat.GRPO_CHAT``.

        Raises:
            ConfigError: The answers were sampled at another temperature or length than the LM's own.
            DataError: The groups are malformed, or rendered with another DSPy adapter than the answers were sampled
                with.
            DivergedError: The loss is no longer a number.
            TrainingError: The trainer died, or the job has ended.
        """
        if train_data_format not in (None, TrainDataFormat.GRPO_CHAT):
            raise DataError(f"train_data_format={train_data_format!r}: a LoRALM is reinforced on 'grpo_chat' groups.")
        if self._process is None:
            raise TrainingError(f"the GRPO job is {self._status}: nothing can be trained. Start another one.")
        groups = self._new_groups(train_data)
        self._check_calls(groups)
        self._make_room()
        try:
            figures = self._process.ask("step", groups=groups) if groups else {"steps": 0}
        except DataError:
            raise  # nothing was trained, and the trainer is as it was
        except BaseException:
            self.cancel()
            raise
        self._steps += 1
        logger.info("GRPO step %d: %s", self._steps, json.dumps(figures))
        if figures["steps"]:
            self._publish(figures)
        self._ask_for_batches()

    def get_status(self) -> dict[str, Any]:
        """The job's state as ``dspy.clients.utils_finetune.GRPOStatus``."""
        return {
            "job_id": f"{self._name}-{id(self):x}",
            "status": self._status,
            "current_model": self.lm.model,
            "checkpoints": dict(self.checkpoints),
            "last_checkpoint": self.last_checkpoint,
            "pending_batch_ids": list(self._pending),
        }

    def save_checkpoint(self, checkpoint_name: str) -> None:
        """Keeps the present revision on the disk, and its ref (``base-grpo@...``) in ``checkpoints``.

        ``LoRALM(domain=job.checkpoints[NAME], registry=job.folder / "adapters")`` goes on from it; the optimizer's
        state is not kept.

        Raises:
            TrainingError: No step has changed the adapter yet.
        """
        if self._latest is None:
            raise TrainingError(f"checkpoint {checkpoint_name!r}: no step has changed the adapter yet.")
        self.checkpoints[checkpoint_name] = self._latest.ref
        self.last_checkpoint = checkpoint_name

    def terminate(self) -> None:
        """Publishes the last revision to the LM's own registry, binds the LM to it there and ends the trainer."""
        if self._process is not None:
            try:
                self._process.ask("end")
            except TrainingError as exc:  # it has nothing left to do: the last revision is on the disk
                logger.warning("%s", exc)
            finally:
                self._end("terminated")
        if self._latest is None:
            return
        final = self._target.publish(self._latest.path, self._name, base=self.lm.base, metadata=self._latest.metadata)
        self.lm.unload()  # the engine holds it by its path in the run's folder
        self.lm.rebind(domain=final.ref, registry=self._home)
        self._latest = None

    def cancel(self) -> bool:
        """Ends the trainer at once; the LM stays bound to the revision of the last step."""
        running = self._process is not None
        self._end("cancelled")
        return running

    def status(self) -> str:
        """``"created"``, ``"running"``, ``"terminated"`` or ``"cancelled"``."""
        return self._status

    # -- inside ----------------------------------------------------------------------------------------------------

    def _end(self, status: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
        if self._status == "running":
            self._release()
        self._status, self._pending, self._trained = status, [], []

    def _ask_for_batches(self) -> None:
        self._pending = list(itertools.islice(_batch_ids, _BATCHES))

    def _new_groups(self, train_data: list[dict[str, Any]]) -> list[Group]:
        """Each group once, without those of the step before."""
        found: list[Any] = []
        for entry in train_data:
            group = entry["group"]
            if not any(group is other for other in (*found, *self._trained)):
                found.append(group)
        self._trained = found
        return found

    def _check_calls(self, groups: list[Group]) -> None:
        """Looks for the calls with the groups' system messages, where DSPy keeps a history of the LM's."""
        calls = [entry for entry in self.lm.history if entry.get("messages")]
        usual = self.lm.kwargs
        own = {key: usual[key] for key in _SAMPLING}
        sent = {_system(entry["messages"]) for entry in calls}
        fitting = {_system(entry["messages"]) for entry in calls if own.items() <= (usual | entry["kwargs"]).items()}
        for system in {_system(group[0]["messages"]) for group in groups} if sent else ():
            if system not in sent:
                raise DataError(
                    f"the groups were rendered with another DSPy adapter than the answers were sampled with: no call "
                    f"had the system message {system[:200]!r}. Give GRPO(adapter=...) the adapter of "
                    "dspy.configure(adapter=...), or leave both out."
                )
            if system not in fitting:
                raise ConfigError(
                    f"GRPO takes the answers for sampled at the LM's own {own}, and no call with the system message "
                    f"{system[:200]!r} had these. Set them on the LoRALM, not on a predictor."
                )

    def _make_room(self) -> None:
        """Ends the engine where it needs the trainer's memory; the next call starts it again."""
        if self._turns:
            self.lm.kill()

    def _publish(self, figures: dict[str, Any]) -> None:
        """Publishes what the trainer saved in the run's folder, binds the LM to it and removes old steps."""
        lineage = {
            "method": "GRPO",
            "parent": self._parent.ref if self._parent else None,
            "step": self._steps,
        }
        metadata = {"config": self.settings.model_dump(mode="json"), "result": figures, "lineage": lineage}
        source = self.folder / "adapter"
        self._latest = self._staging.publish(source, self._name, base=self.lm.base, metadata=metadata)
        self.lm.rebind(domain=self._latest.ref, registry=self._staging.root)
        kept = {*self.checkpoints.values()}
        for old in self._staging.history(self._name)[: -self.settings.keep]:
            if old.ref not in kept:
                self.lm.engine.unload(self.lm.model_string(old.ref))
                self._staging.remove(self._name, old.revision)


class TrainerProcess:
    """The process of ``grpo.py``: starts it, and asks it one thing at a time.

    Args:
        log: File for what it prints.

    Raises:
        TrainingError: It did not come up.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "dspy_lora.training.grpo.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,  # Ctrl-C goes to the user's program, which ends this one
                text=True,
                encoding="utf-8",
                env=child_environment(),
            )
        self._stop = weakref.finalize(self, _stop, self._child)
        self.has_cuda: bool = self._reply("starting")["cuda"]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Sends one request and waits for the answer.

        Raises:
            TrainingError: It could not do it, or died; then the message ends with the last lines of its log.
        """
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer, which will not come, says why
            self._child.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._child.stdin.flush()
        return self._reply(what)

    def kill(self) -> None:
        """Ends it, whatever it is doing."""
        self._stop()

    def _reply(self, what: str) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.endswith("\n"):
            status = self._child.wait()
            raise TrainingError(
                f"the GRPO trainer {ending(status)} (while asked to {what!r}). Start another job.\n"
                f"Last lines of its log ({self._log}):\n{last_lines(self._log.read_text(errors='replace'))}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise _ERRORS.get(reply["error"], TrainingError)(reply["message"])
        value: dict[str, Any] = reply["value"]
        return value


def _stop(child: "subprocess.Popen[str]") -> None:
    kill_group(child.pid)
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _settings(lm: "LoRALM", given: dict[str, Any]) -> GRPOSettings:
    """The settings: what was given over what lora_config.yaml says.

    Raises:
        ConfigError: One is unknown or not allowed, or the LM cannot be trained this way.
    """
    if lm.domain is not None and lm.adapter is None:
        raise ConfigError("LoRALM(domain='auto') chooses an adapter for each call; GRPO trains one. Name a domain.")
    if not lm.kwargs.get("temperature"):
        raise ConfigError(
            "GRPO learns from answers that differ, and this LoRALM is greedy (temperature=0). "
            "Use LoRALM(..., temperature=1.0)."
        )
    if not lm.kwargs.get("max_tokens"):
        raise ConfigError("this LoRALM has max_tokens=None, and GRPO must know how long answers may be. Give one.")
    if unknown := sorted(given.keys() - GRPOSettings.model_fields.keys()):
        raise ConfigError(f"train_kwargs: no setting {unknown[0]!r}. {near(unknown[0], GRPOSettings.model_fields)}")
    if lm.adapter is not None and (shape := sorted(given.keys() & _SHAPE)):
        raise ConfigError(
            f"train_kwargs={{{shape[0]!r}: ...}}: the adapter {lm.adapter.ref!r} goes on with the shape it has. Leave "
            "it out, or start from the base with LoRALM(domain=None)."
        )
    config = load_config()
    configured = config.lora.model_dump(include=_SHAPE) | of_the_base(config)
    try:
        settings = GRPOSettings.model_validate(configured | given)
    except pydantic.ValidationError as exc:
        raise ConfigError(f"train_kwargs: {problems(exc)}") from exc
    if lm.adapter is None:
        check_rank(settings.r, lm.engine.settings if isinstance(lm.engine, LocalEngine) else None)
    return settings


def _shares_gpu(lm: "LoRALM", settings: GRPOSettings) -> bool:
    """Whether engine and trainer take turns on the GPU."""
    if settings.share_gpu is not None or not isinstance(lm.engine, LocalEngine):
        return bool(settings.share_gpu)
    share = lm.engine.settings.engine_args.get("gpu_memory_utilization")
    return share is None or share > 0.5


def _format_as_sampled(job: LoRAReinforceJob) -> Any:
    """Makes ``dspy.GRPO`` render groups as the rollouts were.

    Where no adapter is configured, a program's calls use ChatAdapter, but GRPO renders its groups with XMLAdapter
    (dspy 3.4.1, teleprompt/grpo.py). Here ChatAdapter is named, in the caller's context alone and while the job lives.
    Its second try through JSONAdapter is off: an answer in another format would be trained on as one in this format.

    Returns:
        What takes it back, by itself when the job is gone.
    """
    before = thread_local_overrides.get()
    if before.get("adapter", dspy.settings.adapter) is not None:
        return lambda: None
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    thread_local_overrides.set(type(before)(before, adapter=adapter))
    return weakref.finalize(job, _take_back, adapter)


def _take_back(adapter: dspy.Adapter) -> None:
    now = thread_local_overrides.get()
    if now.get("adapter") is adapter:
        thread_local_overrides.set(type(now)({key: value for key, value in now.items() if key != "adapter"}))


def _system(messages: list[dict[str, Any]]) -> str:
    return str(messages[0]["content"])


def _default_name(domain: str | None) -> str:
    stem = (domain or "base").removesuffix(_SUFFIX)
    return f"{stem[:_LONGEST_STEM]}{_SUFFIX}"
