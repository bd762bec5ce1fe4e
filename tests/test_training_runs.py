"""A run on a tiny random base: its steps, its validation, its folder, and mistakes that are said in words."""

import argparse
import errno
import gc
import json
import math
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import dspy
import pytest

from dspy_lora.errors import ConfigError, DataError, DivergedError, MissingDependencyError, TrainingError

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl", "datasets"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from dspy_lora.training import command, data, failures, loading, sft  # noqa: E402
from dspy_lora.training.chats import ChatConfig  # noqa: E402
from dspy_lora.training.checkpoints import Checkpoints, differences  # noqa: E402
from dspy_lora.training.grpo import process  # noqa: E402
from dspy_lora.training.jobs import LoRATrainingJob  # noqa: E402
from dspy_lora.training.lock import alone  # noqa: E402
from dspy_lora.training.publishing import summary  # noqa: E402
from dspy_lora.training.run import Run  # noqa: E402
from dspy_lora.training.sft import TrainConfig, train  # noqa: E402
from dspy_lora.training.sweep import Sweep  # noqa: E402

SIGNATURE = dspy.Signature("text -> label", "Name the colour.")
ROWS = [{"text": f"thing {n}", "label": "red" if n % 2 else "blue"} for n in range(40)]
SMALL_BASE = SimpleNamespace(num_parameters=lambda: 1000, dtype=torch.float32)  # what _arguments asks a model


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Any:
    def build(folder: str = "run", **changes: Any) -> TrainConfig:
        usual = {"train": ROWS[:8], "dev": ROWS[:2], "max_steps": 1, "batch_size": 4, "r": 4, "eval_rows": 1}
        usual |= {"signature": SIGNATURE, "base": str(tiny_base), "output_dir": tmp_path / folder, "quiet": True}
        return TrainConfig(**usual | changes)

    return build


def card_of(config: TrainConfig) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((config.output_dir / "run.json").read_text())
    return card


# -- its steps -----------------------------------------------------------------------------------------------------


def test_a_run_of_one_step_trains(config: Any) -> None:
    weights = load_file(train(config()) / "adapter" / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.03, 1, 0), (0.03, 99, 2), (0.03, 300, 9), (0.9, 3, 2)])
def test_the_rate_rises_over_whole_steps_and_not_over_all(config: Any, ratio: float, steps: int, warmup: int) -> None:
    args = sft._arguments(config(warmup_ratio=ratio, max_steps=steps), SMALL_BASE, 8)
    assert args.get_warmup_steps(steps) == warmup


@pytest.mark.parametrize(("rows", "batch", "epochs", "steps"), [(33, 32, 3, 4), (5, 32, 3, 1), (64, 8, 0.5, 4)])
def test_epochs_do_not_overshoot(config: Any, rows: int, batch: int, epochs: float, steps: int) -> None:
    made = config(max_steps=None, epochs=epochs, batch_size=batch)
    assert sft._arguments(made, SMALL_BASE, rows).max_steps == steps


def test_a_gpu_without_tf32_and_bfloat16_is_trained_on(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=7, minor=5, name="Tesla T4")
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert sft._arguments(config(), SMALL_BASE, 8).tf32 is None
    assert not loading._gpu_has_bfloat16()


# -- its validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_validation_loss_is_a_mean_over_tokens_whatever_the_batch(config: Any, weight: float) -> None:
    dev = [{"text": "say", "label": "red " * 40}, *ROWS[:6]]
    losses = []
    for size in (1, 3, 16):
        made = config(f"{size}", dev=dev, eval_batch_size=size, learning_rate=1e-30, prompt_loss_weight=weight)
        train(made)
        losses.append(card_of(made)["result"]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) == pytest.approx(losses[2], rel=1e-4)


def test_answered_rows_are_drawn_from_all() -> None:
    rows = [{"label": "blue"}] * 200 + [{"label": "red"}] * 200
    asked = sft._asked(rows, 100)
    assert len(asked) == 100 and {row["label"] for row in asked} == {"blue", "red"}
    assert sft._asked(rows, 100) == asked
    assert sft._asked(rows, 500) == rows


def test_the_same_rows_are_held_out_whatever_the_seed(config: Any) -> None:
    first, second = (sft.load_rows(config(train=ROWS, dev=None, seed=seed)) for seed in (0, 1))
    assert first.numbers["dev"] == second.numbers["dev"]


# -- its folder ----------------------------------------------------------------------------------------------------


def test_another_run_in_the_same_folder_is_refused(config: Any) -> None:
    made = config()
    with alone(made.output_dir), pytest.raises(TrainingError, match="another run trains there"):
        train(made)
    train(made)


def test_a_folder_on_a_disk_without_locks_takes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dspy_lora.training.lock.fcntl.flock", none)
    with alone(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_an_output_folder_that_is_a_file_is_said(config: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run cannot hold a run: .* Give another output folder"):
        train(config())


def test_half_a_card_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[:10], **options)
        raise OSError("No space left on device")

    run = Run(tmp_path, "run", quiet=True)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        run.close()
    assert not (tmp_path / "run.json").exists()


def test_hours_of_one_gpu_are_counted_where_there_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    run = Run(tmp_path, "run", quiet=True)
    run._start -= 3600
    run.close()
    assert json.loads((tmp_path / "run.json").read_text())["gpu_hours"] == pytest.approx(1, abs=0.01)


def test_another_description_or_type_is_another_task(config: Any) -> None:
    described = dspy.Signature(
        {"text": (str, dspy.InputField()), "label": (str, dspy.OutputField(desc="one word"))}, "Name the colour."
    )
    typed = dspy.Signature(
        {"text": (str, dspy.InputField()), "label": (Literal["red", "blue"], dspy.OutputField())}, "Name the colour."
    )
    before = config().settings()
    assert not differences(before, config().settings())
    for other in (described, typed):
        [change] = differences(before, config(signature=other).settings())
        assert change.startswith("signature was ")


def test_a_job_given_epochs_says_its_steps(config: Any, tmp_path: Path) -> None:
    train(config(max_steps=None, epochs=2))
    job = LoRATrainingJob()
    job._config = ChatConfig(train=tmp_path / "rows.jsonl", output_dir=tmp_path / "run", epochs=2)
    assert job.status()["max_steps"] == 4


# -- several runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path: Path) -> Any:
    """Parses flags of ``dspy-lora train`` for a domain with rows."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def parse(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        place = ["--domain", "legal", "--data", str(tmp_path), "--output-dir", str(tmp_path / "runs")]
        return parser.parse_args([*place, *words])

    return parse


def test_a_sweep_without_a_run_that_ended_says_so(flags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: TrainConfig, resume: bool) -> Path:
        raise DivergedError("the loss is no longer a number")

    assert summary([]).startswith("name")
    monkeypatch.setattr(command, "train", diverge)
    with pytest.raises(DivergedError, match="legal: the loss exploded for every value of --sweep learning_rate=1,2"):
        command.run(flags("--sweep", "learning_rate=1,2"))


def test_a_runs_model_is_gone_before_the_next_run(flags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.callback = self

    made: list[Any] = []

    def hold(config: TrainConfig, resume: bool) -> Path:
        made.append(weakref.ref(Trainer()))
        return config.output_dir

    monkeypatch.setattr(command, "train", hold)
    gc.disable()
    try:
        command._train_one(flags(), "legal", None)
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_setting_that_may_be_none_can_be_swept() -> None:
    assert Sweep.parse("neftune_noise_alpha=1,5").values == ("1", "5")


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"use_rslora": False}, {"r": 8}, {"lora_alpha": 8}, {"use_dora": True}, {"target_modules": ("q_proj",)}]
)
def test_a_parent_of_another_shape_is_refused(config: Any, change: dict[str, Any]) -> None:
    parent = train(config("parent", max_steps=1)) / "adapter"
    [key] = change
    with pytest.raises(ConfigError, match=rf"{key} = .*, but the adapter that training goes on from"):
        train(config(parent=parent, **change))
    assert not config().output_dir.exists()


def test_target_modules_that_the_base_lacks_are_refused(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_modules names qkv, which base .* does not have\. It has .*q_proj"):
        train(config(target_modules=("qkv",)))
    with pytest.raises(ConfigError, match="target_modules names qkv"):
        train(config(target_modules=("q_proj", "qkv"), registry=tmp_path / "registry"))
    train(config(target_modules=("q_proj", "qkv")))


def test_a_template_without_a_system_message_is_said(config: Any, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = base / "chat_template.jinja"
    template.write_text(guard + template.read_text())
    with pytest.raises(DataError, match=r"chat template refuses DSPy's messages.*System role not supported"):
        train(config(base=str(base)))


def test_validation_rows_that_are_all_too_long_are_said_to_be_those(config: Any) -> None:
    with pytest.raises(DataError, match="no row to validate on fits max_length=200"):
        train(config(dev=[{"text": "word " * 400, "label": "red"}], max_length=200))


def test_a_row_that_is_no_unicode_is_named(config: Any) -> None:
    with pytest.raises(DataError, match=r"row 9: 'text' = .* cannot be written as JSON"):
        train(config(train=[*ROWS[:8], {"text": "a\ud800", "label": "red"}]))
    assert data.sha256([{"a": "ä"}]) == data.sha256([{"a": "ä"}]) != data.sha256([{"a": "\ud800"}])


def test_an_optimizer_of_bitsandbytes_needs_it(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for optim in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(MissingDependencyError, match="training needs 'bitsandbytes'"):
            train(config(optim=optim))


def test_a_cpu_without_memory_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path, "run", quiet=True)
    with (
        pytest.raises(TrainingError, match="run: out of memory"),
        failures.explained("run", run, Checkpoints(tmp_path)),
    ):
        torch.empty(10**15)
    answer = process._answer(lambda: {"size": torch.empty(10**15).numel()}, {})
    assert answer["error"] == "TrainingError" and "out of memory" in answer["message"]


def test_a_number_of_epochs_without_end_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        config(epochs=math.inf)
