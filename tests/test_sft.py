"""Training on a tiny random base: what is learnt, what is written, what is refused."""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_lora.errors import ConfigError, DataError, TrainingError, UnknownDomainError

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl", "datasets"):
    pytest.importorskip(package)

from dspy_lora.training import command, data, scoring  # noqa: E402
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


def settings(base: Path, folder: Path, **changes: Any) -> TrainConfig:
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


def test_the_adapter_learns_the_task(trained: tuple[TrainConfig, str]) -> None:
    config, _ = trained
    losses = [line["loss"] for line in read_metrics(config) if "loss" in line]
    assert losses[-1] < losses[0] / 2
    result = read_card(config)["result"]
    assert result["exact_match"] >= result["base_exact_match"] + 0.25


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


def test_the_adapter_folder_is_plain_safetensors(trained: tuple[TrainConfig, str], base: Path) -> None:
    from safetensors import safe_open

    config, _ = trained
    folder = config.output_dir / "adapter"
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in config.output_dir.iterdir()} == {"adapter", "metrics.jsonl", "run.json"}
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
    with pytest.raises(TrainingError, match=r"no longer a number\. Use a smaller learning_rate"):
        train(settings(base, tmp_path, learning_rate=1e30, max_steps=20, eval_every=20, quiet=True))
    assert not (tmp_path / "adapter").exists()


def test_no_rows_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="animals: there are no rows to train on"):
        train(settings(base, tmp_path, train=[]))
    with pytest.raises(DataError, match="no rows to validate on"):
        train(settings(base, tmp_path, dev=[]))


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


# dspy-lora train


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
    args = parse("--domain", "legal", "customer_service", *flags, "--max-steps", "2", "--r", "8", "--eval-rows", "2")
    assert command.run(args) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:2] == ["name", "rows"]
    assert [line.split()[:3] for line in table[1:]] == [["legal", "24", "2"], ["customer_service", "22", "2"]]
    card = json.loads((tmp_path / "runs/legal/run.json").read_text())
    assert card["config"]["train"] == str(data_folder / "legal/cuad/train.jsonl")
    assert (card["config"]["r"], card["config"]["lora_alpha"], card["config"]["batch_size"]) == (8, 32, 32)
    assert card["config"]["signature"]["instructions"] == "Name the type of the contract clause."


def test_flags_come_before_the_configuration(data_folder: Path) -> None:
    from dspy_lora.config import load_config

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
    ],
)
def test_mistakes_show_before_anything_is_trained(
    flags: list[str], error: type[Exception], message: str, data_folder: Path, tmp_path: Path
) -> None:
    filled = [flag.format(data=data_folder) for flag in flags]
    with pytest.raises(error, match=message):
        command.run(parse(*filled, "--output-dir", str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
