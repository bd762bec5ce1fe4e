"""Training on a tiny random base: what is learnt, what is written, what is refused."""

import argparse
import errno
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_lora.config import load_config
from dspy_lora.errors import (
    ConfigError,
    DataError,
    DivergedError,
    MissingDependencyError,
    PublishError,
    TrainingError,
    UnknownDomainError,
)

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl", "datasets"):
    pytest.importorskip(package)

from dspy_lora.training import command, data, order, scoring, sft  # noqa: E402
from dspy_lora.training.sft import TrainConfig, train  # noqa: E402

SIGNATURE = dspy.Signature("text -> label", "Say which animal it is.")
SOUNDS = {"barks": "dog", "meows": "cat", "moos": "cow", "quacks": "duck"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    sounds = [rng.choice(list(SOUNDS)) for _ in range(count)]
    return [{"text": f"Number {rng.randrange(99)} {sound} at night.", "label": SOUNDS[sound]} for sound in sounds]


def teach_format(model: Any, tokenizer: Any) -> None:
    """Trains all weights a little on rows with random labels: the base nearly knows DSPy's format and no animal."""
    rng = random.Random(0)
    rows = [row | {"label": rng.choice(list(SOUNDS.values()))} for row in make_rows(64)]
    tokens, _ = data.tokenize(tokenizer, data.render(SIGNATURE, rows), 512)
    width = max(row["length"] for row in tokens)
    ids = torch.tensor([row["input_ids"] + [0] * (width - row["length"]) for row in tokens])
    labels = torch.tensor([row["labels"] + [-100] * (width - row["length"]) for row in tokens])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(80):
        batch = slice(step * 8 % 64, step * 8 % 64 + 8)
        optimizer.zero_grad()
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with a BPE tokenizer of its own and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [str(example) for example in data.render(SIGNATURE, make_rows(50))]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    teach_format(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def settings(base: str | Path, folder: Path, **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "signature": SIGNATURE,
        "train": make_rows(64),
        "dev": make_rows(16, seed=1),
        "output_dir": folder,
        "base": str(base),
        "name": "animals",
        "max_steps": 4,
        "batch_size": 8,
        "eval_every": 2,
        "eval_rows": 4,
    }
    return TrainConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, str]:
    """One run long enough to learn something, and its console text."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("run")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(64)))
    config = settings(
        base,
        folder / "out",
        train=folder / "train.jsonl",
        max_steps=60,
        learning_rate=3e-3,
        eval_every=20,
        eval_rows=16,
    )
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        assert train(config) == folder / "out"
    return config, console.getvalue()


def read_metrics(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


def read_card(config: TrainConfig) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((config.output_dir / "run.json").read_text())
    return card


# Tokens


def test_tokens_are_the_engines_prompt_the_answer_and_the_end(tokenizer: Any) -> None:
    rows = [*make_rows(20), {"text": "umlaut ä\n\n<|im_end|> [[", "label": "[[ x"}]
    examples = data.render(SIGNATURE, rows)
    tokens, left_out = data.tokenize(tokenizer, examples, 512)
    assert left_out == 0
    for example, row in zip(examples, tokens, strict=True):
        served = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(example["completion"][0]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == served + answer
        assert row["labels"] == [-100] * len(served) + answer
        assert row["length"] == len(row["input_ids"])


def test_tokens_are_trls_own_without_what_follows_the_end_of_the_turn(
    tokenizer: Any, base: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    examples = data.render(SIGNATURE, make_rows(20))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(output_dir=str(tmp_path), max_length=512, bf16=False, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    [newline] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokens, _ = data.tokenize(tokenizer, examples, 512)
    for ours, trls in zip(tokens, trainer.train_dataset, strict=True):
        assert [*ours["input_ids"], newline] == trls["input_ids"]
        assert [*ours["labels"], newline] == trls["labels"]


def test_rows_that_are_too_long_are_counted_not_cut(tokenizer: Any) -> None:
    examples = data.render(SIGNATURE, [*make_rows(3), {"text": "long " * 300, "label": "dog"}])
    tokens, left_out = data.tokenize(tokenizer, examples, 400)
    assert (len(tokens), left_out) == (3, 1)
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in tokens)
    with pytest.raises(DataError, match="no row fits max_length=10: the shortest takes"):
        data.tokenize(tokenizer, examples, 10)


def test_a_base_without_a_chat_template_is_refused(base: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(base)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        data.tokenize(bare, data.render(SIGNATURE, make_rows(1)), 512)


# A run


@pytest.mark.timeout(600)
def test_the_adapter_learns_the_task(tmp_path: Path) -> None:
    """On the seedling: whether the tiny base learns it hangs on its random weights."""
    run = {"max_steps": 24, "learning_rate": 1e-3, "eval_every": 24, "eval_rows": 16, "quiet": True}
    config = settings("seedling", tmp_path / "out", **run)
    train(config)
    losses = [line["loss"] for line in read_metrics(config) if "loss" in line]
    assert losses[-1] < losses[0] * 0.2
    result = read_card(config)["result"]
    assert result["base_exact_match"] == 0
    assert result["exact_match"] >= 0.5


def test_metrics_hold_losses_rates_and_validations(trained: tuple[TrainConfig, str]) -> None:
    config, _ = trained
    metrics = read_metrics(config)
    steps = [line for line in metrics if "loss" in line]
    validations = [line for line in metrics if "eval_loss" in line]
    assert all({"loss", "learning_rate", "grad_norm", "seconds"} <= line.keys() for line in steps)
    assert [line["step"] for line in steps] == list(range(6, 61, 6))
    assert [line["step"] for line in validations] == [20, 40, 60, 60]  # the last one: the best weights as saved
    assert all(0 <= line["eval_exact_match"] <= 1 for line in validations)


def test_the_best_validation_is_what_is_saved(trained: tuple[TrainConfig, str]) -> None:
    config, _ = trained
    validations = [line for line in read_metrics(config) if "eval_loss" in line]
    result = read_card(config)["result"]
    best = max(validations[:-1], key=lambda line: (line["eval_exact_match"], -line["eval_loss"]))
    assert result["best_step"] == best["step"]
    assert result["eval_loss"] == validations[-1]["eval_loss"] == pytest.approx(best["eval_loss"], abs=0.02)


def test_the_run_card_says_what_was_done(trained: tuple[TrainConfig, str], base: Path) -> None:
    from dspy_lora.adapters.base import resolve_base

    config, _ = trained
    card = read_card(config)
    assert isinstance(config.train, Path)
    assert card["data"]["sha256"] == {"train": data.sha256(config.train), "dev": data.sha256(config.dev or [])}
    assert card["data"]["train"]["rows"] == 64
    assert card["base"]["revision"] == resolve_base(str(base)).revision
    assert card["config"]["learning_rate"] == 3e-3
    assert card["config"]["signature"]["instructions"] == "Say which animal it is."
    assert card["versions"]["torch"] == torch.__version__
    assert card["hardware"]["cpus"] >= 1
    assert card["wall_seconds"] > 0
    gpus = min(card["hardware"]["gpus"], 1)
    assert card["gpu_hours"] == pytest.approx(card["wall_seconds"] / 3600 * gpus, abs=1e-4)
    assert card["hardware"]["peak_memory"] > 1e8


def test_the_adapter_folder_is_plain_safetensors(trained: tuple[TrainConfig, str], base: Path) -> None:
    from safetensors import safe_open

    config, _ = trained
    folder = config.output_dir / "adapter"
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in config.output_dir.iterdir()} == {
        ".training", "adapter", "loss.png", "metrics.jsonl", "run.json",
    }  # fmt: skip
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"], written["bias"]) == (16, 32, True, "none")
    assert written["base_model_name_or_path"] == str(base)
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert len(names) == 2 * 7 * 2  # layers, projections, A and B
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}


def test_the_saved_adapter_gives_the_reported_figure(
    trained: tuple[TrainConfig, str], base: Path, tokenizer: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, _ = trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    questions = scoring.Questions.prepare(tokenizer, SIGNATURE, dspy.ChatAdapter(), make_rows(16, seed=1), 512)
    assert scoring.exact_match(model, tokenizer, questions, 4) == read_card(config)["result"]["base_exact_match"]
    served = PeftModel.from_pretrained(model, config.output_dir / "adapter")
    assert scoring.exact_match(served, tokenizer, questions, 4) == read_card(config)["result"]["exact_match"]


def test_the_console_says_what_goes_on(trained: tuple[TrainConfig, str], base: Path) -> None:
    _, console = trained
    lines = console.splitlines()
    assert all(line.startswith("[animals] ") for line in lines)
    assert f"base {base}" in lines[0] and "0.1 M parameters" in lines[0]
    assert "rsLoRA r=16 alpha=32" in lines[1] and "parameters train" in lines[1]
    assert "60 steps of 8 rows" in lines[2]
    assert (
        sum(bool(re.search(r"step +\d+/60  loss \d\.\d{4}  lr \d\.\d\de-0\d  [\d.]+ steps/s$", line)) for line in lines)
        == 10
    )
    assert re.search(r"validation loss \d\.\d{4}, exact match [\d.]+ \(base model [\d.]+\) on 16 rows$", lines[-1])


def test_the_same_seed_gives_the_same_weights(base: Path, tmp_path: Path) -> None:
    files = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = train(settings(base, tmp_path / run, seed=seed, dev=None, quiet=True))
        files.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_one_gpu_of_several_is_trained_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    made, real = [], trl.SFTConfig.__post_init__

    def sees_two(self: Any) -> None:
        real(self)
        self._n_gpu = 2  # what transformers counts where it sees two and no launcher
        made.append(self)

    monkeypatch.setattr(trl.SFTConfig, "__post_init__", sees_two)
    config = settings(base, tmp_path, max_steps=2, quiet=True)
    train(config)
    assert (made[0].n_gpu, made[0].train_batch_size) == (1, config.batch_size)
    assert read_card(config)["result"]["steps"] == 2


def test_settings_reach_the_adapter(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = settings(
        base, tmp_path, r=8, target_modules=("q_proj",), use_rslora=False, use_dora=True, adapter_dtype="float32",
        select_by="loss", epochs=0.5, max_steps=None, quiet=True,
    )  # fmt: skip
    adapter = train(config) / "adapter"
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert (written["r"], written["target_modules"], written["use_dora"]) == (8, ["q_proj"], True)
    assert not written["use_rslora"]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert any("magnitude" in name for name in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert read_card(config)["result"]["steps"] == 4  # half of 64 rows by 8


def test_a_run_publishes_what_it_trained(base: Path, tmp_path: Path) -> None:
    from dspy_lora.adapters.registry import AdapterRegistry

    config = settings(base, tmp_path / "run", registry=tmp_path / "registry", quiet=True)
    train(config)
    revision = AdapterRegistry(tmp_path / "registry").resolve("animals")
    assert (revision.rank, revision.base) == (16, read_card(config)["base"]["revision"])
    assert revision.metadata["result"] == read_card(config)["result"]
    assert revision.metadata["data"] == read_card(config)["data"]["sha256"]


def test_a_loss_that_explodes_ends_the_run(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"no longer a number\. Use a smaller learning_rate"):
        train(settings(base, tmp_path, learning_rate=1e30, max_steps=20, eval_every=20, quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {".training", "metrics.jsonl"}


def test_no_rows_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="animals: there are no rows to train on"):
        train(settings(base, tmp_path, train=[]))
    with pytest.raises(DataError, match="no rows to validate on"):
        train(settings(base, tmp_path, dev=[]))


# The order of the rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 20))
def test_every_row_comes_once_before_any_comes_again(lengths: list[int], batch_size: int, steps: int) -> None:
    laid_out = order.row_order(lengths, batch_size, steps, seed=3)
    assert len(laid_out) == steps * batch_size
    for start in range(0, len(laid_out), len(lengths)):
        epoch = laid_out[start : start + len(lengths)]
        assert len(set(epoch)) == len(epoch)
    assert laid_out == order.row_order(lengths, batch_size, steps, seed=3)
    assert order.row_order(lengths, batch_size, 2 * steps, seed=3)[: len(laid_out)] == laid_out


def test_rows_of_like_length_share_a_step() -> None:
    lengths = [length for length in range(1, 65) for _ in range(2)]
    laid_out = order.row_order(lengths, 8, 16, seed=0)
    widths = [
        max(lengths[i] for i in laid_out[j : j + 8]) - min(lengths[i] for i in laid_out[j : j + 8])
        for j in range(0, 128, 8)
    ]
    assert sum(widths) / len(widths) < 32  # 50 in any order


# Runs that end early


def weights(config: TrainConfig) -> bytes:
    return (config.output_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def short(base: str | Path, folder: Path, **changes: Any) -> TrainConfig:
    """Seven steps over three passes of the rows, two steps between checkpoints, the last one at the seventh."""
    defaults = {"train": make_rows(20), "max_steps": 7, "adapter_dtype": "float32", "select_by": "loss"}
    return settings(base, folder, **(defaults | changes))


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = short(base, tmp_path_factory.mktemp("unbroken") / "run", quiet=True)
    train(config)
    return config


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from dspy_lora.training.watch import Watch

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_step_end", on_step_end)


KILLED = """
import os, signal, sys
from pathlib import Path
import dspy
from dspy_lora.training.sft import TrainConfig, train
from dspy_lora.training.watch import Watch

Watch.on_step_end = lambda self, args, state, control, **_: (
    os.kill(os.getpid(), signal.SIGKILL) if state.global_step == 3 else None
)
train(TrainConfig.model_validate_json(sys.argv[1], context=None).model_copy(
    update={"signature": dspy.Signature("text -> label", sys.argv[2])}
))
"""


def test_a_killed_run_of_the_seedling_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    changes = {"train": make_rows(5), "dev": make_rows(2), "eval_rows": 1, "max_steps": 6, "batch_size": 1, "r": 4}
    changes |= {"target_modules": ("q_proj", "v_proj")}
    whole, killed = (short("seedling", tmp_path / name, **changes, quiet=True) for name in ("whole", "killed"))
    train(whole)
    written = json.dumps(killed.model_dump(mode="json", exclude={"signature"}) | {"signature": None})
    command = [sys.executable, "-c", KILLED, written, SIGNATURE.instructions]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert not (killed.output_dir / "adapter").exists()
    assert (killed.output_dir / "checkpoints" / "checkpoint-2").is_dir()
    train(killed, resume=True)
    files = [load_file(config.output_dir / "adapter" / "adapter_model.safetensors") for config in (whole, killed)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert any(weight.abs().max() > 0 for name, weight in files[0].items() if "lora_B" in name)


@pytest.mark.parametrize(("step", "checkpoint"), [(1, None), (3, 2), (5, 4), (7, 6)])
def test_a_run_goes_on_from_its_last_checkpoint(
    step: int,
    checkpoint: int | None,
    base: Path,
    unbroken: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = short(base, tmp_path / "run", registry=tmp_path / "registry")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        train(config)
    said = capsys.readouterr().out.splitlines()[-1]
    assert ("no checkpoint yet" if checkpoint is None else f"last checkpoint is of step {checkpoint} (") in said
    assert not (tmp_path / "registry").exists() and not (config.output_dir / "adapter").exists()
    train(config, resume=True)
    assert weights(config) == weights(unbroken)
    assert (f"going on from step {checkpoint}, " in capsys.readouterr().out) == (checkpoint is not None)
    steps = [(line["step"], line.get("eval_loss")) for line in read_metrics(config)]
    assert steps == [(line["step"], line.get("eval_loss")) for line in read_metrics(unbroken)]
    assert [line["seconds"] for line in read_metrics(config)] == sorted(
        line["seconds"] for line in read_metrics(config)
    )
    assert read_card(config)["result"] == read_card(unbroken)["result"]
    assert not (config.output_dir / "checkpoints").exists()


def test_a_run_killed_after_its_last_step_trains_no_further(
    base: Path, unbroken: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(base, tmp_path / "run", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "save_adapter", lambda *_: interrupted())
        train(config)
    train(config, resume=True)
    assert weights(config) == weights(unbroken)
    assert read_card(config)["result"] == read_card(unbroken)["result"]


def interrupted() -> None:
    raise KeyboardInterrupt


def test_half_a_checkpoint_is_not_gone_on_from(
    base: Path, unbroken: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(base, tmp_path / "run", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 5)
        train(config)
    state = config.output_dir / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    with (config.output_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')
    train(config, resume=True)
    assert weights(config) == weights(unbroken)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    error: Exception, base: Path, unbroken: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    config = short(base, tmp_path / "run", registry=tmp_path / "registry", quiet=True)
    save = Trainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 6:
            raise error
        save(self, folder)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"no space is left .* step 4 .* --resume"):
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        train(config)
    assert not (tmp_path / "registry").exists() and not (config.output_dir / "adapter").exists()
    train(config, resume=True)
    assert weights(config) == weights(unbroken)


def test_a_full_disk_at_the_end_leaves_no_half_adapter(
    base: Path, unbroken: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    from dspy_lora.adapters import registry

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = short(base, tmp_path / "run", registry=tmp_path / "registry", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="step 7"):
        patch.setattr(safetensors.torch, "save_file", lambda tensors, file, *_: Path(file).exists() and full())
        train(config)
    assert not any(path.name.startswith("adapter") for path in config.output_dir.iterdir())
    with monkeypatch.context() as patch, pytest.raises(PublishError, match="Nothing was changed"):
        patch.setattr(registry, "stage_adapter", full)
        train(config, resume=True)
    assert not list((tmp_path / "registry").glob("animals/*"))
    train(config, resume=True)
    assert weights(config) == weights(unbroken)
    assert registry.AdapterRegistry(tmp_path / "registry").resolve("animals").rank == 16


def test_other_errors_pass_as_they_are(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sft, "_train", out_of_memory)
    with pytest.raises(TrainingError, match=r"out of memory\. Use a smaller micro_batch_size .* no checkpoint yet"):
        train(short(base, tmp_path / "run", quiet=True))
    monkeypatch.setattr(sft, "_train", lambda *_: Path("/nowhere").read_text())
    with pytest.raises(FileNotFoundError):
        train(short(base, tmp_path / "run", quiet=True))


def test_a_run_is_gone_on_with_only_as_it_was_begun(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short(base, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        train(config)
    with pytest.raises(TrainingError, match=r"not finished \(up to step 2\)\. Go on with --resume"):
        train(config)
    with pytest.raises(ConfigError, match=r"other settings: r was 16 and is 8\. Set them back"):
        train(config.model_copy(update={"r": 8}), resume=True)
    with pytest.raises(ConfigError, match=r"sha256 was"):
        train(config.model_copy(update={"train": make_rows(20, seed=5)}), resume=True)
    train(config.model_copy(update={"micro_batch_size": 1}), resume=True)
    card = (config.output_dir / "run.json").read_text()
    train(config, resume=True)
    assert "finished already" in capsys.readouterr().out
    assert (config.output_dir / "run.json").read_text() == card


def test_a_run_out_of_patience_stops(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"learning_rate": 1e-30, "patience": 2, "eval_every": 1, "quiet": True}  # the loss never falls
    config = short(base, tmp_path / "run", **changes, train=make_rows(40), adapter_dtype="bfloat16")
    train(config)
    result = read_card(config)["result"]
    assert (result["steps"], result["best_step"]) == (3, 1)
    late = short(base, tmp_path / "late", **changes, train=make_rows(40), adapter_dtype="bfloat16")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "save_adapter", lambda *_: interrupted())
        train(late)
    train(late, resume=True)
    assert read_card(late)["result"] == result


# Variants


@pytest.mark.parametrize(("weight", "smallest_large_model"), [(0.0, sft.SMALL_MODEL), (0.5, sft.SMALL_MODEL), (0.5, 0)])
def test_prompts_count_in_the_loss_by_their_weight(
    base: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weight: float,
    smallest_large_model: int,  # which trains in micro-batches, with gradient checkpointing
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(sft, "SMALL_MODEL", smallest_large_model)
    rows = make_rows(8)
    config = settings(
        base, tmp_path, train=rows, dev=rows, max_steps=1, eval_every=1, lora_dropout=0, dtype="float32",
        learning_rate=1e-30, prompt_loss_weight=weight, micro_batch_size=2, quiet=True,
    )  # fmt: skip
    train(config)
    step, validation, *_ = read_metrics(config)
    tokens, _ = data.tokenize(tokenizer, data.render(SIGNATURE, rows), 512)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts, answers, count = 0.0, 0.0, 0
    for row in tokens:  # one by one: without padding
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        prompts += float(losses[labels == -100].sum())
        answers += float(losses[labels != -100].sum())
        count += int((labels != -100).sum())
    assert step["loss"] == pytest.approx((answers + weight * prompts) / count, rel=1e-3)
    assert 0 <= step["mean_token_accuracy"] <= 1
    assert validation["eval_loss"] == pytest.approx(answers / count, rel=1e-3)


@pytest.fixture(scope="module")
def experts(base: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a Mixtral of one layer, always with the same weights, with a coefficient of the loss on its router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def make(coefficient: float) -> Path:
        folder = tmp_path_factory.mktemp("experts")
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, max_position_embeddings=512,
            router_aux_loss_coef=coefficient, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(folder)
        return folder

    return make


def test_prompts_in_the_loss_leave_the_balance_of_experts_in_it(
    experts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "SMALL_MODEL", 0)  # micro-batches
    losses = {}
    for coefficient in (0.0, 0.5):
        folder = experts(coefficient)
        for weight in (0.0, 0.5):
            config = settings(
                folder, tmp_path / f"{coefficient} {weight}", train=make_rows(8), max_steps=1, eval_every=1,
                lora_dropout=0, dtype="float32", learning_rate=1e-30, target_modules=("q_proj",),
                prompt_loss_weight=weight, micro_batch_size=2, gradient_checkpointing=False, quiet=True,
            )  # fmt: skip
            train(config)
            losses[coefficient, weight] = read_metrics(config)[0]["loss"]
    ours, trls = (losses[0.5, weight] - losses[0.0, weight] for weight in (0.5, 0.0))
    assert ours == pytest.approx(trls, rel=1e-3)
    assert ours > 0.4


@pytest.mark.parametrize("dev", [None, make_rows(4)])
def test_a_row_that_cannot_be_rendered_is_named_by_its_number_in_the_users_rows(
    base: Path, tmp_path: Path, dev: list[dict[str, Any]] | None
) -> None:
    rows = make_rows(40)
    rows[22]["label"] = "[[ ## label ## ]]"
    with pytest.raises(DataError, match="row 23: ChatAdapter would not read the same answer back"):
        train(settings(base, tmp_path, train=rows, dev=dev, noisy_copies=3, quiet=True))


def test_noisy_copies_are_made_of_rows_to_train_on_alone(base: Path, tmp_path: Path) -> None:
    rows = [{"text": "A dog barks.", "label": f"{number}"} for number in range(40)]
    configs = (settings(base, tmp_path, train=rows, dev=None, noisy_copies=copies) for copies in (0, 2))
    plain, noisy = map(sft.load_rows, configs)
    assert noisy.dev == plain.dev
    assert len(noisy.train) == 3 * len(plain.train)
    assert {row["label"] for row in noisy.train} == {row["label"] for row in plain.train}


def test_noisy_copies_need_a_text(base: Path, tmp_path: Path) -> None:
    numbers = {"signature": dspy.Signature("count: int -> label"), "train": [{"count": 1, "label": "dog"}] * 20}
    with pytest.raises(ConfigError, match="noisy_copies = 2: 'count -> label' has no input text"):
        train(settings(base, tmp_path, noisy_copies=2, **numbers))


def test_over_a_4_bit_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from dspy_lora.adapters.registry import AdapterRegistry

    changes = {"train": make_rows(2), "dev": make_rows(1), "eval_rows": 1, "max_steps": 3, "batch_size": 2}
    registry = tmp_path / "registry"
    config = short("seedling", tmp_path / "run", **changes, qlora=True, learning_rate=1e-3, registry=registry)
    models: list[Any] = []
    save = sft.save_adapter
    monkeypatch.setattr(sft, "save_adapter", lambda model, *args: models.append(model) or save(model, *args))
    train(config)
    layer = models[0].base_model.model.model.layers[0].self_attn.q_proj
    quantized = layer.base_layer.weight
    assert (quantized.dtype, quantized.quant_state.quant_type, quantized.quant_state.nested) == (
        torch.uint8,
        "nf4",
        True,
    )
    assert layer.lora_A["default"].weight.dtype == torch.float32
    losses = [line["loss"] for line in read_metrics(config) if "loss" in line]
    assert losses[-1] < losses[0]
    revision = AdapterRegistry(registry).resolve("animals")
    assert revision.metadata["config"]["qlora"] is True
    assert 15e6 < revision.metadata["result"]["parameters"] < 21e6  # not halved by the packing
    ids = torch.arange(3, 20)[None]
    models[0].eval()(input_ids=ids)
    models[0].train()(input_ids=ids, labels=ids).loss.backward()  # after a validation gradients still reach layer 0
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


def test_dora_is_refused_before_it_is_trained_for_a_registry(base: Path, tmp_path: Path, data_folder: Path) -> None:
    with pytest.raises(ValueError, match="`dspy-lora merge`"):
        settings(base, tmp_path, use_dora=True, registry=tmp_path / "registry")
    flags = ["--domain", "legal", "--data", str(data_folder / "legal/cuad"), "--use-dora"]
    assert command.plan(parse(*flags), load_config(), "legal").use_dora
    with pytest.raises(ConfigError, match=r"domain 'legal': vLLM serves no DoRA.*legal/adapter with `dspy-lora merge`"):
        command.run(parse(*flags, "--publish", str(tmp_path / "registry"), "--output-dir", str(tmp_path)))


def test_demos_are_trained_and_asked_with(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    demos = [{"text": "Number 1 moos.", "label": "cow"}]
    config = short(base, tmp_path, demos=demos, max_steps=1, quiet=True)
    train(config)
    examples = data.render(SIGNATURE, config.train, demos=demos)
    tokens, _ = data.tokenize(tokenizer, examples, 512)
    card = read_card(config)
    assert card["data"]["train"]["tokens"] == sum(row["length"] for row in tokens)
    assert card["config"]["demos"] == demos
    questions = scoring.Questions.prepare(tokenizer, SIGNATURE, dspy.ChatAdapter(), make_rows(1), 512, demos)
    assert "Number 1 moos." in tokenizer.decode(questions.prompts[0])


def test_the_loss_curve_is_left_out_without_matplotlib(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(short(base, tmp_path, max_steps=1))
    assert "a loss curve needs matplotlib. Run: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists() and (tmp_path / "run.json").exists()


def test_trackers_get_the_trainers_reports(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from transformers import integrations
    from transformers.integrations import integration_utils

    reported: dict[str, list[int]] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.folder = log_dir

        def add_scalar(self, key: str, value: float, step: int) -> None:
            reported.setdefault(f"{self.folder}: {key}", []).append(step)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    config = short(base, tmp_path, report_to=("tensorboard",), max_steps=4, quiet=True)
    for module in (integrations, integration_utils):
        monkeypatch.setattr(module, "is_tensorboard_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        train(config)
    for module in (integrations, integration_utils):
        monkeypatch.setattr(module, "is_tensorboard_available", lambda: True)
    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    train(config)
    folder = tmp_path / "tensorboard"
    assert reported[f"{folder}: train/loss"] == [1, 2, 3, 4]
    assert reported[f"{folder}: train/learning_rate"] == [1, 2, 3, 4]
    assert reported[f"{folder}: eval/loss"] == [2, 4, 4]


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_gets_the_losses(base: Path, tmp_path: Path, mlflow: Any) -> None:
    train(short(base, tmp_path / "run", report_to=("mlflow",), max_steps=4, quiet=True))
    (run,) = mlflow.search_runs(experiment_names=["tests"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [each.step for each in history] == [1, 2, 3, 4]


# Greedy answers


def test_greedy_answers_do_not_depend_on_the_batch(base: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    prompts = data.prompt_ids(tokenizer, [example["prompt"] for example in data.render(SIGNATURE, make_rows(5))])
    prompts.insert(2, [])
    prompts.append(prompts[0][:17])
    alone = [scoring.greedy(model, tokenizer, [prompt], 6, 1)[0] for prompt in prompts]
    assert scoring.greedy(model, tokenizer, prompts, 6, 4) == alone
    assert alone[2] == "" and alone[0] != ""
    assert model.training


def test_a_prompt_without_room_for_its_answer_counts_as_wrong(tokenizer: Any) -> None:
    rows = [*make_rows(1), {"text": "long " * 200, "label": "dog"}]
    questions = scoring.Questions.prepare(tokenizer, SIGNATURE, dspy.ChatAdapter(), rows, context=400)
    assert questions.prompts[0] and not questions.prompts[1]
    assert len(questions.rows) == 2


def test_one_long_answer_takes_no_room_from_other_rows(
    base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*make_rows(3), {"text": "x", "label": "dog " * 60}, {"text": "much longer " * 9, "label": "cat"}]
    lengths = [row["length"] for row in data.tokenize(tokenizer, data.render(SIGNATURE, rows), 10**6)[0]]
    context = max(lengths)  # the row with the long answer fits exactly, without spare tokens
    assert lengths.index(context) == 3
    questions = scoring.Questions.prepare(tokenizer, SIGNATURE, dspy.ChatAdapter(), rows, context)
    assert all(questions.prompts)
    answers = {tuple(ids): row["label"] for ids, row in zip(questions.prompts, rows, strict=True)}

    def right(model: Any, tokenizer: Any, prompts: Any, room: int, batch_size: int) -> list[str]:
        assert len(prompts) <= batch_size
        texts = [f"[[ ## label ## ]]\n{answers[tuple(ids)]}\n\n[[ ## completed ## ]]" for ids in prompts]
        assert all(len(tokenizer(text.strip())["input_ids"]) < room for text in texts)
        assert max(map(len, prompts)) + room <= context
        return texts

    monkeypatch.setattr(scoring, "greedy", right)
    for size in (1, 2, 64):
        assert scoring.exact_match(None, tokenizer, questions, size) == 1
    too_short = scoring.Questions.prepare(tokenizer, SIGNATURE, dspy.ChatAdapter(), rows, context - 1)
    assert [bool(prompt) for prompt in too_short.prompts] == [True, True, True, False, True]
    assert scoring.exact_match(None, tokenizer, too_short, 64) == 4 / 5


# dspy-lora train

LEGAL = ["--domain", "legal", "--data-root", "{data}"]


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    for domain in ("legal/cuad", "customer_service/banking77"):
        folder = tmp_path / "data" / domain
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(24)))
    (tmp_path / "data/legal/cuad/dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    return tmp_path / "data"


def test_the_command_trains_each_domain_on_its_set(
    base: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data-root", str(data_folder), "--output-dir", str(tmp_path / "runs"), "--base-model", str(base)]
    args = parse(
        "--domain", "legal", "customer_service", "legal", *flags, "--max-steps", "2", "--r", "8", "--eval-rows", "2"
    )
    assert command.run(args) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:2] == ["name", "rows"]
    assert [line.split()[:3] for line in table[1:]] == [["legal", "24", "2"], ["customer_service", "22", "2"]]
    card = json.loads((tmp_path / "runs/legal/run.json").read_text())
    assert card["config"]["train"] == str(data_folder / "legal/cuad/train.jsonl")
    assert (card["config"]["r"], card["config"]["lora_alpha"], card["config"]["batch_size"]) == (8, 32, 32)
    assert card["config"]["signature"]["instructions"] == "Name the type of the contract clause."


def test_flags_come_before_the_configuration(data_folder: Path) -> None:
    args = parse(
        "--domain", "legal", "--data", str(data_folder / "legal/cuad"), "--learning-rate", "0.01", "--seed", "7"
    )
    config = command.plan(args, load_config(), "legal")
    assert (config.learning_rate, config.seed, config.weight_decay) == (0.01, 7, 1e-5)
    assert (config.train, config.dev) == tuple(
        data_folder / "legal/cuad" / name for name in ("train.jsonl", "dev.jsonl")
    )
    file = parse("--domain", "legal", "--data", str(data_folder / "legal/cuad/train.jsonl"))
    assert command.plan(file, load_config(), "legal").dev is None


def test_epochs_take_the_place_of_the_configured_steps_but_not_of_given_ones(data_folder: Path) -> None:
    flags = ["--domain", "legal", "--data", str(data_folder / "legal/cuad")]
    config = command.plan(parse(*flags), load_config(), "legal")
    assert config.max_steps == load_config().domain("legal").max_steps
    config = command.plan(parse(*flags, "--epochs", "1.5"), load_config(), "legal")
    assert (config.epochs, config.max_steps) == (1.5, None)
    config = command.plan(parse(*flags, "--sweep", "epochs=1,2"), load_config(), "legal", "2")
    assert (config.epochs, config.max_steps) == (2, None)
    config = command.plan(parse(*flags, "--epochs", "1", "--max-steps", "7"), load_config(), "legal")
    assert (config.epochs, config.max_steps) == (1, 7)


def test_the_best_run_of_a_sweep_is_published(
    base: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dspy_lora.adapters.registry import AdapterRegistry

    flags = [
        "--data",
        str(data_folder / "legal/cuad"),
        "--output-dir",
        str(tmp_path / "runs"),
        "--base-model",
        str(base),
    ]
    flags += ["--max-steps", "3", "--batch-size", "4", "--eval-rows", "2", "--publish", str(tmp_path / "registry")]
    args = parse("--domain", "legal", *flags, "--sweep", "learning_rate=1e-9,1e-2,1e30")
    assert command.run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[-4:]
    assert "left out: legal learning_rate=1e30: the loss is no longer a number. Use a smaller learning_rate." in lines
    assert [line.split()[:2] for line in table[1:3]] == [
        ["legal", f"learning_rate={value}"] for value in ("1e-9", "1e-2")
    ]
    revision = AdapterRegistry(tmp_path / "registry").resolve("legal")
    results = {
        value: json.loads((tmp_path / f"runs/legal/learning_rate={value}/run.json").read_text())["result"]
        for value in ("1e-9", "1e-2")
    }
    best = max(results, key=lambda value: (results[value]["exact_match"], -results[value]["eval_loss"]))
    assert results["1e-9"]["eval_loss"] != results["1e-2"]["eval_loss"]
    assert table[3] == f"best of legal: learning_rate={best}, published as {revision.ref} to {tmp_path / 'registry'}"
    assert revision.metadata["config"]["learning_rate"] == float(best)
    assert len(AdapterRegistry(tmp_path / "registry").history("legal")) == 1
    args.resume = True
    assert command.run(args) == 0
    assert "[legal learning_rate=1e-9] " in capsys.readouterr().out


def test_settings_of_the_file_and_switches_reach_a_run(data_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora_config.yaml"
    file.write_text(
        "qlora: {enabled: true, bnb_4bit_compute_dtype: float32}\nlora: {use_rslora: false}\n"
        "training: {prompt_loss_weight: 0.1}\n"
    )
    flags = ["--domain", "legal", "--data", str(data_folder / "legal/cuad")]
    config = command.plan(parse(*flags), load_config(file), "legal")
    assert (config.qlora, config.bnb_4bit_compute_dtype, config.use_rslora) == (True, "float32", False)
    switches = ["--no-qlora", "--use-rslora", "--patience", "3", "--report-to", "mlflow", "--noisy-copies", "2"]
    args = parse(*flags, *switches)
    config = command.plan(args, load_config(file), "legal")
    assert (config.qlora, config.use_rslora, config.patience, config.report_to) == (False, True, 3, ("mlflow",))
    assert (config.noisy_copies, config.prompt_loss_weight) == (2, 0.1)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--domain", "leagl", "--data", "."], UnknownDomainError, "Did you mean 'legal'"),
        (["--domain", "legal", "--data", "nowhere"], DataError, "there is no nowhere/train.jsonl"),
        (["--domain", "financial", "--data-root", "{data}"], DataError, "financial/tatqa_answer_type/train.jsonl"),
        (
            ["--domain", "legal", "--data-root", "{data}", "--r", "0"],
            ConfigError,
            "r = 0: Input should be greater than 0",
        ),
        (["--domain", "legal", "customer_service", "--data", "{data}/legal/cuad"], ConfigError, "Use --data-root"),
        ([*LEGAL, "--sweep", "learning_rat=1"], ConfigError, "no numeric setting. Did you mean 'learning_rate'"),
        ([*LEGAL, "--sweep", "base=1"], ConfigError, "'base' is no numeric setting"),
        ([*LEGAL, "--sweep", "r=8,"], ConfigError, "give different values"),
        ([*LEGAL, "--sweep", "r=8,8"], ConfigError, "give different values"),
        ([*LEGAL, "--max-steps", "9", "--sweep", "epochs=1,2"], ConfigError, "all runs would be the same"),
        ([*LEGAL, "--sweep", "r=8,x"], ConfigError, "r = 'x': Input should be a valid integer"),
        ([*LEGAL, "--epochs", "inf"], ConfigError, "epochs = inf: Input should be a finite number"),
        ([*LEGAL, "--r", "600", "--publish", "registry"], ConfigError, "r = 600 is above 512"),
        ([*LEGAL, "--r", "32", "--publish", "registry", "--config", "{data}/ranks.yaml"], ConfigError, "is above 16"),
        ([*LEGAL, "--config", "{data}/targets.yaml"], ConfigError, "target_modules names qkv, which base seedling"),
        (
            ["--domain", "legal", "real_estate", "--data-root", "{data}"],
            DataError,
            "real_estate/.*/train.jsonl: 1 of 1 rows are malformed",
        ),
    ],
)
def test_mistakes_show_before_anything_is_trained(
    flags: list[str], error: type[Exception], message: str, data_folder: Path, tmp_path: Path
) -> None:
    (data_folder / "ranks.yaml").write_text("serving: {max_lora_rank: 16}")
    (data_folder / "targets.yaml").write_text("lora: {target_modules: [qkv]}")
    malformed = data_folder / str(load_config().domain("real_estate").data) / "train.jsonl"
    malformed.parent.mkdir(parents=True)
    malformed.write_text("{}")
    filled = [flag.format(data=data_folder) for flag in flags]
    with pytest.raises(error, match=message):
        command.run(parse(*filled, "--output-dir", str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
