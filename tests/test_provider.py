"""LoRALM's provider: what DSPy's weight optimizers call, with a stand-in for the engine and a tiny base to train."""

import copy
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest
from dspy import lm15
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus
from dspy_lora.optimizers.bootstrap_finetune import BootstrapFinetune
from hypothesis import given
from hypothesis import strategies as st

from dspy_lora import LoRALM
from dspy_lora.engine import client, local
from dspy_lora.errors import AdapterError, ConfigError, DataError, TrainingError
from dspy_lora.training import jobs
from dspy_lora.training.chats import ChatConfig, Verbatim, chat_rows
from dspy_lora.training.jobs import LoRATrainingJob
from dspy_lora.training.sft import train

for package in ("torch", "transformers", "peft", "trl", "datasets"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"max_steps": 4, "batch_size": 4, "eval_every": 2, "eval_rows": 2, "r": 4, "lora_alpha": 8, "quiet": True}
CHAT = TrainDataFormat.CHAT


def chats(count=10, task="Name the animal."):
    system = {"role": "system", "content": task}
    return [
        {
            "messages": [
                system,
                {"role": "user", "content": f"{n} barks"},
                {"role": "assistant", "content": f"dog {n}"},
            ]
        }
        for n in range(count)
    ]


@pytest.fixture
def lm(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("DSPY_FINETUNEDIR", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return LoRALM(str(tiny_base), registry=tmp_path / "adapters", cache=False)


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """One real run: the LM it began with, its job, what that said meanwhile, and the LM it came to."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPY_FINETUNEDIR", str(root / "runs"))
        patch.setenv("OMP_NUM_THREADS", "1")
        first = LoRALM(str(tiny_base), registry=root / "adapters", cache=False)
        job = first.finetune(chats(), CHAT, SMALL)
        states = set()
        while not job.done():
            states.add(job.status()["status"])
            time.sleep(0.05)
    return first, job, states, job.result()


@pytest.fixture
def pretend(trained, monkeypatch):
    """Takes the place of the child process: jobs end at once with the adapter of the real run. Gives their settings."""
    runs = []

    def train(job, config, make_room):
        runs.append(config)
        shutil.copytree(trained[1].folder / "adapter", config.output_dir / "adapter", dirs_exist_ok=True)
        shutil.copy(trained[1].folder / "run.json", config.output_dir)
        return config.output_dir

    monkeypatch.setattr(LoRATrainingJob, "train", train)
    return runs


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_job_trains_in_a_process_of_its_own_and_publishes_an_unmerged_adapter_with_its_lineage(trained):
    lm, job, states, tuned = trained
    assert isinstance(tuned, LoRALM), tuned
    assert tuned.model == f"{lm.model}/{tuned.adapter.ref}"
    assert tuned.base == lm.base
    lineage = tuned.adapter.metadata["lineage"]
    assert lineage["program"] == [{"system": "Name the animal.", "chats": 10}]
    assert lineage["parent"] is None
    assert tuned.domain == f"base-{lineage['data'][:8]}"
    assert (tuned.adapter.path / "adapter_model.safetensors").is_file()
    assert tuned.adapter.rank == 4
    assert TrainingStatus.running in states <= {TrainingStatus.pending, TrainingStatus.running}
    status = job.status()
    assert status["status"] == "succeeded"
    assert status["step"] == status["max_steps"] == 4
    assert status["eval_loss"] > 0
    assert "base model" in (job.folder / jobs.LOG_FILE).read_text()


def test_a_run_goes_on_from_the_weights_of_its_parent(trained, tiny_base, tmp_path):
    from safetensors.torch import load_file

    parent = trained[3].adapter.path
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(chats(4))))
    still = SMALL | {"max_steps": 1, "eval_every": 1, "learning_rate": 1e-9}
    run = train(
        ChatConfig(train=rows, output_dir=tmp_path / "run", base=str(tiny_base), parent=parent, **still), resume=True
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (parent, run / "adapter"))
    assert all((before[name] - after[name]).abs().max() < 1e-4 for name in before)
    assert max(weight.abs().max() for name, weight in before.items() if "lora_B" in name) > 1e-4


def test_an_equal_job_takes_over_the_finished_run(trained, monkeypatch):
    lm, job, _, tuned = trained
    monkeypatch.setenv("DSPY_FINETUNEDIR", str(job.folder.parent))
    card = (job.folder / "run.json").stat().st_mtime_ns
    assert lm.finetune(chats(), CHAT, SMALL).result().model == tuned.model
    assert (job.folder / "run.json").stat().st_mtime_ns == card


# -- its settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"learning_rat": 1e-3}, ConfigError, "Did you mean 'learning_rate'"),
        ({"learning_rate": -1}, ConfigError, "learning_rate"),
        ({"use_dora": True}, ConfigError, "DoRA"),
        ({"r": 32}, ConfigError, "ranks up to 16"),
        ({"registry": "elsewhere"}, ConfigError, "is no setting"),
        ({"noisy_copies": 3}, ConfigError, "is no setting"),
        ({"adapter": "../up"}, AdapterError, "is no adapter name"),
    ],
)
def test_a_wrong_setting_is_said_before_anything_runs(lm, pretend, kwargs, error, words):
    result = lm.finetune(chats(), CHAT, kwargs).result()
    assert isinstance(result, error)
    assert words in str(result)
    assert not pretend


def test_settings_come_from_the_caller_then_the_parent_then_the_configuration(trained, lm, pretend, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_TRAINING__WEIGHT_DECAY", "0.5")
    monkeypatch.setenv("DSPY_LORA_TRAINING__NOISY_COPIES", "3")  # of rows: chats are left alone
    tuned = trained[3]
    tuned.finetune(chats(), CHAT, {"learning_rate": 0.01, "prompt_loss_weight": 0.1}).result()
    assert (pretend[-1].r, pretend[-1].learning_rate, pretend[-1].weight_decay) == (4, 0.01, 0.5)
    assert (pretend[-1].prompt_loss_weight, pretend[-1].noisy_copies) == (0.1, 0)
    assert pretend[-1].parent == tuned.adapter.path
    tuned.finetune(chats(), CHAT, {"from_parent": False, "r": 2}).result()
    assert (pretend[-1].r, pretend[-1].parent) == (2, None)
    conflict = tuned.finetune(chats(), CHAT, {"r": 2}).result()
    assert isinstance(conflict, ConfigError)
    assert "from_parent=False" in str(conflict)


def test_a_domain_of_the_adapters_name_lends_its_settings(lm, pretend, tmp_path, monkeypatch):
    (tmp_path / "lora_config.yaml").write_text("domains:\n  animals: {task: Name it., max_steps: 77}\n")
    monkeypatch.chdir(tmp_path)
    lm.finetune(chats(), CHAT, {"adapter": "animals"}).result()
    assert pretend[-1].max_steps == 77


def test_epochs_take_the_place_of_the_configured_steps(lm, pretend):
    lm.finetune(chats(), CHAT, {"epochs": 1}).result()
    assert (pretend[-1].epochs, pretend[-1].max_steps) == (1, None)
    lm.finetune(chats(), CHAT, {"epochs": 1, "max_steps": 5}).result()
    assert (pretend[-1].epochs, pretend[-1].max_steps) == (1, 5)


def test_the_name_of_a_chain_of_adapters_does_not_grow(trained, pretend):
    tuned = trained[3].finetune(chats(3), CHAT, {}).result()
    assert tuned.domain.startswith("base-")
    assert len(tuned.domain) == len("base-01234567")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4))
def test_any_chat_that_ends_in_an_answer_keeps_its_messages(texts):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, ["ask", *texts], strict=False)]
    example = {"messages": [*messages, {"role": "assistant", "content": "so"}]}
    assert chat_rows([example]) == [{"chat": messages, "answer": "so"}]
    assert Verbatim().format(None, [], {"chat": messages}) == messages


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "no example passed the metric"),
        ([{"prompt": "a"}], "it needs 'messages'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "a prompt and an answer"),
        ([{"messages": chats(1)[0]["messages"][:2]}], "no answer of the assistant"),
        ([*chats(1), {"messages": [{"role": "bot", "content": ""}] * 2}], "example 2: a message needs a role"),
        ([{"messages": [{"role": "user", "content": None}] * 2}], "not NoneType"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(lm, pretend, examples, words):
    result = lm.finetune(examples, CHAT, {}).result()
    assert isinstance(result, DataError)
    assert words in str(result)
    assert not pretend


def test_other_formats_and_the_lm_that_chooses_are_refused(lm, pretend):
    assert isinstance(lm.finetune([{"prompt": "a", "completion": "b"}], "completion", {}).result(), DataError)
    assert "LoRALM(domain=NAME)" in str(lm.copy(domain="auto").finetune(chats(), CHAT, {}).result())


def test_the_settings_reach_the_child_as_they_are(tmp_path):
    config = ChatConfig(train=tmp_path / "chats.jsonl", output_dir=tmp_path, parent=tmp_path / "p", **SMALL)
    again = ChatConfig.model_validate_json(config.to_json())
    assert again.settings() == config.settings() | {"quiet": False}  # what the parent does not show is in the log
    assert again.parent == tmp_path / "p"


# -- the child process -------------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Puts a program in the place of the training process."""

    def put(text):
        program = tmp_path / "child"
        program.write_text(f"#!{sys.executable}\nimport os, sys, time\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setattr(jobs.sys, "executable", str(program))

    return put


def until(test):
    deadline = time.monotonic() + 60
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_fails_hands_on_its_last_words(lm, child):
    child("print('[x] step 1'); print('no space left'); sys.exit(3)")
    job = lm.finetune(chats(), CHAT, {})
    result = job.result()
    assert isinstance(result, TrainingError)
    assert "ended with status 3" in str(result)
    assert "no space left" in str(result)
    assert job.status()["status"] == "failed"


def test_progress_is_shown_unless_quiet(lm, child, capfd):
    child("print('[mine] step 1/2', flush=True); print('other'); sys.exit(1)")
    shown = lm.finetune(chats(), CHAT, {"adapter": "mine"})
    shown.thread.join()
    assert capfd.readouterr().err.count("[mine] step 1/2") == 2  # as it came, and in the error that DSPy logs
    quiet = lm.finetune(chats(), CHAT, {"adapter": "mine", "quiet": True})
    quiet.thread.join()
    assert quiet.folder == shown.folder  # the runs are equal
    assert capfd.readouterr().err.count("[mine] step 1/2") == 1


def test_jobs_that_start_at_once_train_one_after_another_and_a_waiting_one_can_be_cancelled(lm, child, tmp_path):
    mark = tmp_path / "go"
    child(f"while not os.path.exists({str(mark)!r}): time.sleep(0.01)\nsys.exit(4)")
    first, second, third = (lm.finetune(chats(n), CHAT, {}) for n in (3, 4, 5))
    until(lambda: any(job.status()["status"] == "running" for job in (first, second, third)))
    time.sleep(0.3)
    states = [job.status()["status"] for job in (first, second, third)]
    assert sorted(states) == ["pending", "pending", "running"]
    waiting = [job for job in (first, second, third) if job.status()["status"] == "pending"]
    assert waiting[0].cancel()
    waiting[0].thread.join(60)
    assert not waiting[0].thread.is_alive()
    mark.touch()
    assert "status 4" in str(waiting[1].result())


def test_an_equal_job_of_another_process_is_waited_for(lm, child):
    child("sys.exit(5)")
    failed = lm.finetune(chats(6), CHAT, {})
    assert "status 5" in str(failed.result())
    with (failed.folder / jobs.LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting, cancelled = (lm.finetune(chats(6), CHAT, {}) for _ in range(2))
        time.sleep(0.5)
        assert waiting.status()["status"] == cancelled.status()["status"] == "pending"
        assert cancelled.cancel()
        cancelled.thread.join(60)
        assert not cancelled.thread.is_alive()
    assert "status 5" in str(waiting.result())
    assert waiting.folder == failed.folder


def test_a_cancelled_job_ends_its_process(lm, child):
    child("print('[x] up', flush=True); time.sleep(60)")
    job = lm.finetune(chats(), CHAT, {})
    until(lambda: job.status()["status"] == "running")
    process = job._process
    assert job.cancel()
    job.thread.join(60)
    assert process.poll() is not None
    assert job.status()["status"] == "cancelled"
    assert job.cancel()  # again
    with pytest.raises(CancelledError):
        job.result()


def test_a_job_that_is_done_cannot_be_cancelled(lm, pretend):
    job = lm.finetune(chats(), CHAT, {})
    job.thread.join()
    assert not job.cancel()
    assert job.status()["status"] == "succeeded"


def test_the_child_ends_with_the_process_that_started_it(tmp_path):
    pipe = subprocess.Popen(
        [sys.executable, "-c", "from dspy_lora.training import chats; chats._end_with_parent()"], stdin=subprocess.PIPE
    )
    pipe.stdin.close()
    assert pipe.wait(60) == 1


def test_grpo_gets_its_job_from_a_module_of_its_own(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "dspy_lora.training.reinforce", SimpleNamespace(LoRAReinforceJob=SimpleNamespace))
    job = lm.copy().provider.ReinforceJob(lm=lm, train_kwargs={"r": 8})
    assert (job.lm, job.train_kwargs, lm.provider.reinforceable) == (lm, {"r": 8}, True)


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "closed"), [("cuda", 1), ("cpu", 0)])
def test_the_engine_steps_aside_where_it_holds_the_memory_that_training_needs(lm, child, monkeypatch, device, closed):
    child("sys.exit(1)")
    calls = []
    monkeypatch.setattr(client, "close_engines", lambda: calls.append(1))
    monkeypatch.setattr(lm._engine_spec.client, "info", {"device": device})
    lm.finetune(chats(), CHAT, {}).result()
    assert len(calls) == closed


def test_a_servers_lm_is_trained_here(tiny_base, tmp_path, pretend, monkeypatch):
    monkeypatch.setenv("DSPY_FINETUNEDIR", str(tmp_path / "runs"))
    lm = LoRALM(str(tiny_base), registry=tmp_path / "adapters", api_base="http://localhost:1/v1", api_key="k")
    tuned = lm.finetune(chats(), CHAT, {"adapter": "mine"}).result()
    assert tuned.model == f"{lm.model}/{tuned.adapter.ref}"


def test_copies_and_pickles_of_an_lm_can_be_trained(lm, pretend, tmp_path):
    for each in (lm.copy(), copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):  # noqa: S301
        assert each.finetune(chats(), CHAT, {"adapter": "mine"}).result().domain == "mine"
    elsewhere = lm.copy(registry=tmp_path / "other")
    assert (
        elsewhere.finetune(chats(), CHAT, {"adapter": "mine"}).result().adapter.path.is_relative_to(tmp_path / "other")
    )


# -- DSPy's optimizers -------------------------------------------------------------------------------------------------


class TwoSteps(dspy.Module):
    """Its predictors are called in the reverse of the order in which they are defined."""

    def __init__(self):
        super().__init__()
        self.shout = dspy.Predict(dspy.Signature("word -> shouted", "Shout the word."))
        self.pick = dspy.Predict(dspy.Signature("text -> word, rest", "Part the first word from the rest."))

    def forward(self, text):
        return self.shout(word=self.pick(text=text).word)


class Engine:
    """Answers both predictors' prompts rightly, but for the texts in ``broken``; keeps whom it asked."""

    def __init__(self, monkeypatch):
        self.asked, self.broken, self.killed, self.lock = [], {}, 0, threading.Lock()
        monkeypatch.setattr(local.LocalEngine, "complete", lambda engine, request: self.answer(request))
        monkeypatch.setattr(local._Engine, "preload", lambda engine, model: None)
        monkeypatch.setattr(local._Engine, "shutdown", lambda engine: self.kill())

    def kill(self):
        self.killed += 1

    def answer(self, request):
        told = request.messages[-1].parts[0].text
        value = told.split("## ]]\n")[1].split("\n")[0]
        if "## text ## ]]" in told:
            first, _, rest = value.partition(" ")
            text = f"[[ ## word ## ]]\n{first}\n\n[[ ## rest ## ]]\n{rest}\n\n[[ ## completed ## ]]"
        else:
            text = f"[[ ## shouted ## ]]\n{value.upper()}\n\n[[ ## completed ## ]]"
        with self.lock:
            self.asked.append(request.model)
        text = next((bad for word, bad in self.broken.items() if word == value), text)
        message = lm15.Message(role="assistant", parts=(lm15.TextPart(text),))
        return lm15.Response(
            id=None, model=request.model, message=message, finish_reason="stop", usage=lm15.Usage(input_tokens=0)
        )


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


def program(lm):
    made = TwoSteps()
    made.set_lm(lm)
    return made


def examples(count=8):
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    return [dspy.Example(text=f"{w} and so on", shouted=w.upper()).with_inputs("text") for w in words[:count]]


def exact(example, prediction, trace=None):
    return example.shouted == prediction.shouted


def learnt(config):
    """The answers a run learns."""
    return {json.loads(line)["answer"].split("\n")[1] for line in config.train.read_text().splitlines()}


UPPER, LOWER = {e.shouted for e in examples()}, {e.shouted.lower() for e in examples()}


def test_dspys_own_bootstrap_finetune_trains_all_predictors_together(lm, engine, pretend):
    tuned = dspy.BootstrapFinetune(metric=exact, train_kwargs={"adapter": "both"}).compile(program(lm), examples())
    assert [each.domain for each in tuned.predictors() for each in [each.lm]] == ["both", "both"]
    assert learnt(pretend[0]) == UPPER | LOWER
    assert engine.killed == 1
    assert tuned(text="iota kappa").shouted == "IOTA"
    assert set(engine.asked[-2:]) == {tuned.shout.lm.model}


def test_every_predictor_is_trained_on_its_own_calls_whatever_their_order(lm, engine, pretend):
    tuned = BootstrapFinetune(metric=exact, multitask=False).compile(program(lm), examples())
    assert learnt(pretend[[c.name for c in pretend].index(tuned.shout.lm.domain)]) == UPPER
    assert learnt(pretend[[c.name for c in pretend].index(tuned.pick.lm.domain)]) == LOWER
    assert "forward" not in tuned.__dict__


def test_dspys_own_swaps_them(lm, engine, pretend):
    """When this fails, DSPy goes by predictors too, and the difference in our subclass can go."""
    tuned = dspy.BootstrapFinetune(metric=exact, multitask=False).compile(program(lm), examples())
    assert learnt(pretend[[c.name for c in pretend].index(tuned.shout.lm.domain)]) == LOWER


@pytest.mark.parametrize("multitask", [True, False])
@pytest.mark.parametrize("metric", [exact, None])
def test_examples_that_fail_are_left_out(lm, engine, pretend, metric, multitask):
    engine.broken = {  # the second is read in part, the last only after a good call of the other predictor
        "beta and so on": "mumble", "gamma and so on": '{"word": "gamma"}', "delta and so on": "", "theta": "mumble"
    }  # fmt: skip
    student = program(lm)
    forward = student.forward

    def fragile(text):
        if text.startswith("eta"):
            raise ZeroDivisionError
        return forward(text=text)

    student.forward = fragile
    BootstrapFinetune(metric=metric, multitask=multitask, num_threads=2).compile(student, examples())
    good = {"alpha", "epsilon", "zeta"}
    assert set.union(*map(learnt, pretend)) == good | {word.upper() for word in good}
    assert student.forward is fragile


@pytest.mark.parametrize(("bad", "error"), [("mumble", AttributeError), ('{"word": "gamma"}', ValueError)])
def test_dspys_own_ends_with_them(lm, engine, pretend, bad, error):
    """When this fails, DSPy leaves them out too, and that difference in our subclass can go."""
    engine.broken = {"gamma and so on": bad}
    with pytest.raises(error):
        dspy.BootstrapFinetune(metric=exact).compile(program(lm), examples())


def test_a_metric_below_zero_does_not_count(lm, engine, pretend):
    BootstrapFinetune(metric=lambda e, p, trace=None: 1 if p.shouted == "ALPHA" else -1).compile(
        program(lm), examples()
    )
    assert learnt(pretend[0]) == {"alpha", "ALPHA"}


def test_an_example_that_the_metric_cannot_judge_is_left_out(lm, engine, pretend, caplog):
    def metric(example, prediction, trace=None):
        if prediction.shouted == "BETA":
            raise AttributeError("no label")
        return None if prediction.shouted == "GAMMA" else 1

    optimizer = BootstrapFinetune(metric=metric)
    optimizer.compile(program(lm), examples(4))
    assert learnt(pretend[0]) == {"alpha", "ALPHA", "delta", "DELTA"}
    assert optimizer.metric is metric
    assert "an example scores 0: the metric raised AttributeError: no label" in caplog.text


def test_a_teacher_of_the_same_structure_gives_the_data(lm, engine, pretend):
    teacher = program(lm)
    BootstrapFinetune(metric=exact, multitask=False).compile(program(lm), examples(), teacher=[teacher, None])
    assert sorted(map(len, map(learnt, pretend))) == [8, 8]


def test_a_failed_job_ends_compile_with_its_cause(lm, engine, pretend):
    with pytest.raises(DataError, match="no example passed the metric"):
        BootstrapFinetune(metric=lambda *_: 0).compile(program(lm), examples())


@pytest.mark.parametrize("kind", [dspy.BootstrapFinetune, BootstrapFinetune])
@pytest.mark.parametrize("strategy", ["p -> w", "w -> p -> w"])
def test_better_together_trains_prompts_and_weights_in_turn(lm, engine, pretend, kind, strategy):
    optimizer = dspy.BetterTogether(
        metric=exact,
        p=dspy.BootstrapFewShot(metric=exact, max_bootstrapped_demos=1, max_labeled_demos=0),
        w=kind(metric=exact, train_kwargs={"adapter": "both"}),
    )
    best = optimizer.compile(program(lm), trainset=examples(6), valset=examples(8)[6:], strategy=strategy)
    assert not best.flag_compilation_error_occurred
    assert [each["strategy"] for each in best.candidate_programs] == sorted(
        ["", *(strategy[: 1 + at] for at in range(0, len(strategy), 5))], key=len
    )
    assert [config.parent is None for config in pretend] == [True, False][: strategy.count("w")]
    last = next(each["program"] for each in best.candidate_programs if each["strategy"] == strategy)
    assert last.shout.lm.domain == "both"
    assert last.shout.demos
    assert last(text="iota kappa").shouted == "IOTA"  # BetterTogether has killed the LMs


# -- the examples, on the real engine ----------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "words"),
    [("bootstrap_finetune", ["before:", "after:", "triage@"]), ("train_adapter", ["base model:", "tickets@"])],
)
def test_an_example_trains_and_serves_an_adapter(name, words, tmp_path):
    file = ROOT / f"examples/{name}.py"
    assert len(file.read_text().splitlines()) < 60
    settings = {"DSPY_LORA_REGISTRY": str(tmp_path / "adapters"), "DSPY_FINETUNEDIR": str(tmp_path / "runs")}
    done = subprocess.run(
        [sys.executable, str(file), "--max-steps", "3"],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert all(word in done.stdout for word in words), done.stdout
    assert list((tmp_path / "adapters").glob("t*/*/revision.json"))
