"""``dspy.GRPO`` over a LoRALM: what a step does to the LM, the registry and DSPy's settings; the trainer's process."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy.teleprompt.grpo import GRPO

for package in ("torch", "transformers", "peft"):
    pytest.importorskip(package)

from dspy_lora import AdapterRegistry, LoRALM  # noqa: E402
from dspy_lora.engine.local import LocalEngine  # noqa: E402
from dspy_lora.errors import ConfigError, DataError, TrainingError  # noqa: E402
from dspy_lora.training import reinforce  # noqa: E402
from dspy_lora.training.grpo import process  # noqa: E402
from dspy_lora.training.grpo.trainer import GroupTrainer  # noqa: E402
from dspy_lora.training.reinforce import LoRAReinforceJob, TrainerProcess  # noqa: E402

ANSWER = "[[ ## label ## ]]\n{}\n\n[[ ## completed ## ]]"
TRAIN = [dspy.Example(text=text, label="dog").with_inputs("text") for text in ("It barks.", "It bites.")]


class InProcess:
    """The trainer without its process: the same server, asked directly."""

    has_cuda = False

    def __init__(self, log: Path) -> None:
        self.server = process._Server()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append((what, arguments))
        return getattr(self.server, what)(**arguments)

    def kill(self) -> None:
        pass


@pytest.fixture
def trainers(monkeypatch):
    """Trainers run in this process; gives those that were started."""
    started = []

    def start(log):
        started.append(InProcess(log))
        return started[-1]

    monkeypatch.setattr(reinforce, "TrainerProcess", start)
    return started


@pytest.fixture
def asked(monkeypatch):
    """The engine answers "dog" and "cat" by turns; gives the model strings it was asked for."""
    models, answers = [], itertools.cycle(("dog", "cat", "cow"))

    def complete(engine, request):
        models.append(request.model)
        message = lm15.Message(role="assistant", parts=(lm15.TextPart(ANSWER.format(next(answers))),))
        usage = lm15.Usage(input_tokens=0, output_tokens=0)
        return lm15.Response(id=None, model=request.model, message=message, finish_reason="stop", usage=usage)

    monkeypatch.setattr(LocalEngine, "complete", complete)
    return models


@pytest.fixture
def lm(tiny_base, tmp_path, asked, monkeypatch):
    monkeypatch.setenv("DSPY_FINETUNEDIR", str(tmp_path / "runs"))
    return LoRALM(str(tiny_base), registry=tmp_path / "adapters", temperature=1.0, max_tokens=64)


@pytest.fixture
def program(lm):
    predict = dspy.Predict(dspy.Signature("text -> label", "Say which animal it is."))
    predict.set_lm(lm)
    return predict


def optimizer(steps: int = 3, **changes: Any) -> GRPO:
    settings = {
        "metric": lambda example, prediction, trace=None: float(prediction.label == example.label),
        "num_train_steps": steps,
        "num_dspy_examples_per_grpo_step": 2,
        "num_rollouts_per_grpo_step": 3,
        "exclude_demos": True,
        "num_threads": 1,
        "train_kwargs": {"r": 4, "learning_rate": 1e-3},
    }
    return GRPO(**settings | changes)


def rollouts(text: str = "It barks.") -> list[dict[str, Any]]:
    messages = dspy.ChatAdapter().format(dspy.Signature("text -> label"), inputs={"text": text}, demos=[])
    return [
        {"messages": messages, "completion": {"role": "assistant", "content": ANSWER.format(label)}, "reward": reward}
        for label, reward in (("dog", 1.0), ("cat", 0.0))
    ]


def start(lm: LoRALM, **settings: Any) -> LoRAReinforceJob:
    job = LoRAReinforceJob(lm=lm, train_kwargs={"r": 4, "learning_rate": 1e-3} | settings)
    job.initialize()
    return job


# -- dspy.GRPO -----------------------------------------------------------------------------------------------------


def test_grpo_runs_unchanged_and_each_step_answers_from_the_next_revision(lm, program, asked, trainers, tmp_path):
    base, student = lm.model, optimizer().compile(program, trainset=TRAIN)
    assert student is program and student.lm is lm
    steps = [asked[at : at + 6] for at in range(0, 18, 6)]
    assert len(asked) == 18 and all(len(set(step)) == 1 for step in steps)
    assert steps[0][0] == base and len({step[0] for step in steps}) == 3
    assert lm.domain == "base-grpo" and lm.registry.root == tmp_path / "adapters"
    assert lm.adapter.path.parent == tmp_path / "adapters" / "base-grpo"
    assert lm.model not in asked
    lineage = lm.adapter.metadata["lineage"]
    assert lineage["method"] == "GRPO" and lineage["parent"] is None and lineage["step"] == 3
    assert lm.registry.verify(lm.adapter) and len(lm.registry.history("base-grpo")) == 1
    assert student(text="It barks.").label in ("dog", "cat", "cow")
    assert asked[-1] == lm.model


def test_grpo_renders_its_groups_as_the_rollouts_were(lm, program, trainers):
    optimizer(steps=1).compile(program, trainset=TRAIN)
    [groups] = [arguments["groups"] for what, arguments in trainers[0].asked if what == "step"]
    sent = [entry["messages"] for entry in lm.history]
    assert len(groups) == 2 and all(len(group) == 3 for group in groups)
    assert all(answer["messages"] in sent for group in groups for answer in group)
    assert {answer["completion"]["content"].strip() for answer in groups[0]} <= {
        ANSWER.format(label) for label in ("dog", "cat", "cow")
    }
    assert dspy.settings.adapter is None


def test_an_adapter_that_the_user_configured_stays(program, trainers):
    mine = dspy.XMLAdapter()
    xml = "<label>\ndog\n</label>"
    with dspy.context(adapter=mine), pytest.MonkeyPatch.context() as patch:
        message = lm15.Message(role="assistant", parts=(lm15.TextPart(xml),))
        usage = lm15.Usage(input_tokens=0, output_tokens=0)
        response = {"id": None, "message": message, "finish_reason": "stop", "usage": usage}
        patch.setattr(LocalEngine, "complete", lambda engine, request: lm15.Response(model=request.model, **response))
        optimizer(steps=1).compile(program, trainset=TRAIN)
        assert dspy.settings.adapter is mine
    [groups] = [arguments["groups"] for what, arguments in trainers[0].asked if what == "step"]
    assert groups[0][0]["completion"]["content"] == xml


def test_another_adapter_than_the_rollouts_had_is_refused(program, trainers):
    with pytest.raises(DataError, match=r"GRPO\(adapter=\.\.\.\)"):
        optimizer(adapter=dspy.XMLAdapter()).compile(program, trainset=TRAIN)


@pytest.mark.timeout(60)
def test_a_second_compile_of_one_optimizer_does_not_wait_for_batches(lm, program, trainers):
    twice = optimizer(steps=1)
    twice.compile(program, trainset=TRAIN)
    first = lm.model
    twice.train_kwargs[lm].pop("r")  # an adapter goes on with its own shape
    twice.compile(program, trainset=TRAIN)
    assert lm.model != first and lm.adapter.metadata["lineage"]["parent"] == first.rpartition("/")[2]
    assert lm.domain == "base-grpo"


# -- the job -------------------------------------------------------------------------------------------------------


def test_status_tells_what_dspy_asks_for(lm, trainers):
    job = start(lm)
    before = job.get_status()
    assert before["status"] == job.status() == "running" and before["current_model"] == lm.model
    job.step([{"batch_id": before["pending_batch_ids"][0], "group": rollouts()}], "grpo_chat")
    after = job.get_status()
    assert set(after["pending_batch_ids"]) and not set(before["pending_batch_ids"]) & set(after["pending_batch_ids"])
    assert after["current_model"] == lm.model != before["current_model"]
    job.terminate()
    assert job.status() == "terminated" and job.get_status()["pending_batch_ids"] == []
    with pytest.raises(TrainingError, match="terminated"):
        job.step([], "grpo_chat")
    job.terminate()


def test_copies_of_groups_and_groups_of_the_step_before_are_trained_on_once(lm, trainers):
    job, first, second = start(lm), rollouts(), rollouts("It meows.")
    for groups in ([first, second, first, second, first], [first, (third := rollouts()), third]):
        job.step([{"batch_id": at, "group": group} for at, group in enumerate(groups)], "grpo_chat")
    batches = [arguments["groups"] for what, arguments in trainers[0].asked if what == "step"]
    assert batches == [[first, second], [third]] and batches[1][0] is third


def test_only_the_last_steps_and_checkpoints_stay_on_the_disk(lm, trainers, monkeypatch):
    unloaded = []
    monkeypatch.setattr(LocalEngine, "unload", lambda engine, model: unloaded.append(model))
    job, models = start(lm, keep=2), []
    with pytest.raises(TrainingError, match="'none'"):
        job.save_checkpoint("none")
    for step in range(5):
        job.step([{"batch_id": step, "group": rollouts()}], "grpo_chat")
        models.append(lm.model)
        if step == 1:
            job.save_checkpoint("second")
    kept = {revision.ref for revision in AdapterRegistry(job.folder / "adapters").history("base-grpo")}
    assert kept == {models[place].rpartition("/")[2] for place in (1, 3, 4)}
    assert set(unloaded) == {models[0], models[2]}
    assert job.checkpoints == {"second": models[1].rpartition("/")[2]} and job.last_checkpoint == "second"
    assert LoRALM(lm.base.name, domain=job.checkpoints["second"], registry=job.folder / "adapters").model == models[1]


def test_a_step_without_a_difference_leaves_the_lm(lm, trainers):
    job, before = start(lm), lm.model
    job.step([{"batch_id": 0, "group": [answer | {"reward": 1.0} for answer in rollouts()]}], "grpo_chat")
    job.step([], "grpo_chat")
    job.terminate()
    assert lm.model == before and not lm.registry.root.exists()


@pytest.mark.parametrize("share, ends", [(None, True), (True, True), (False, False)])
def test_engine_and_trainer_take_turns_on_one_gpu(lm, trainers, monkeypatch, share, ends):
    events = []
    monkeypatch.setattr(InProcess, "has_cuda", True)
    monkeypatch.setattr(LoRALM, "kill", lambda lm: events.append("kill"))
    monkeypatch.setattr(GroupTrainer, "move", lambda trainer, device: events.append(str(device)))
    job = start(lm, share_gpu=share)
    job.step([{"batch_id": 0, "group": rollouts()}], "grpo_chat")
    here = str(trainers[0].server.trainer.device)
    assert events == (["kill", "cpu", "kill", here, "cpu"] if ends else [])


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({"temperature": 0.0}, {}, "temperature=1.0"),
        ({"domain": "auto"}, {}, "Name a domain"),
        ({}, {"learning_rat": 1}, "'learning_rate'"),
        ({}, {"beta": -1}, "beta = -1"),
        ({}, {"r": 32}, "ranks up to 16"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(lm, trainers, changes, settings, message):
    with pytest.raises(ConfigError, match=message):
        start(lm.copy(**changes), **settings)
    assert trainers == [] and dspy.settings.adapter is None


def test_the_base_is_loaded_as_the_configuration_says(lm, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_QLORA__BNB_4BIT_QUANT_TYPE", "fp4")
    monkeypatch.setenv("DSPY_LORA_QLORA__BNB_4BIT_COMPUTE_DTYPE", "float32")
    monkeypatch.setenv("DSPY_LORA_TRAINING__BF16", "false")
    loading = reinforce._settings(lm, {"qlora": True}).loading(Path("run"))
    assert (loading.qlora, loading.bnb_4bit_quant_type, loading.bnb_4bit_compute_dtype) == (True, "fp4", "float32")
    assert loading.dtype == "float32"
    assert reinforce._settings(lm, {"dtype": "auto"}).loading(Path("run")).dtype == "auto"


@pytest.mark.parametrize("own", [{"temperature": 0.3}, {"max_tokens": 16}])
def test_a_predictor_with_a_temperature_or_length_of_its_own_is_refused(lm, trainers, own):
    program = dspy.Predict(dspy.Signature("text -> label", "Say which animal it is."), **own)
    program.set_lm(lm)
    with pytest.raises(ConfigError, match=r"GRPO takes the answers for sampled at the LM's own .*'temperature': 1.0"):
        optimizer(steps=1).compile(program, trainset=TRAIN)
    assert not [what for what, _ in trainers[0].asked if what == "step"]


def test_a_shape_is_refused_where_the_adapter_has_one(trainers, lm, asked):
    job = start(lm)
    job.step([{"batch_id": 0, "group": rollouts()}], "grpo_chat")
    job.terminate()
    with pytest.raises(ConfigError, match="base-grpo@"):
        start(lm, r=8)


def test_dspy_s_settings_come_back_when_the_job_is_gone(lm, trainers):
    job = start(lm)
    assert isinstance(dspy.settings.adapter, dspy.ChatAdapter)
    del job
    gc.collect()
    assert dspy.settings.adapter is None
    job = start(lm)
    assert job.cancel() and not job.cancel()
    assert dspy.settings.adapter is None and job.status() == "cancelled"


# -- the process ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_trainer_killed_in_mid_step_is_one_clear_error(lm):
    job, before = start(lm, num_iterations=50), lm.model
    job.step([{"batch_id": 0, "group": rollouts()}], "grpo_chat")
    assert lm.model != before
    step, pid = lm.model, job._process.pid
    many = [{"batch_id": at, "group": rollouts(f"It barks {at} times.")} for at in range(200)]
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(TrainingError, match=r"SIGKILL.*'step'[\s\S]*Last lines of its log"):
        job.step(many, "grpo_chat")
    assert lm.model == step and job.status() == "cancelled" and dspy.settings.adapter is None
    with pytest.raises(TrainingError, match="cancelled"):
        job.step(many, "grpo_chat")


@pytest.mark.timeout(60)
def test_what_the_trainer_refuses_is_raised_here_and_it_goes_on(tmp_path):
    trainer = TrainerProcess(tmp_path / "log")
    for _ in range(2):
        with pytest.raises(TrainingError, match="before the model was loaded"):
            trainer.ask("step", groups=[])
    trainer.kill()
    with pytest.raises(ValueError, match="closed"):
        trainer.ask("step", groups=[])


@pytest.mark.timeout(60)
def test_the_trainer_dies_with_its_parent(tmp_path):
    script = f"""
        import time
        from pathlib import Path
        from dspy_lora.training.reinforce import TrainerProcess
        trainer = TrainerProcess(Path({str(tmp_path / "log")!r}))
        print(trainer.pid, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
