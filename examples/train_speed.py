"""What dspy-lora's trainer costs beside a plain TRL script with the same settings: step times and GPU memory.

Usage:
    python examples/train_speed.py --shape 8b --out FOLDER [--steps 16] [--cases lora,qlora,full] [--json FILE]

The model has random weights, which cost what trained ones do: nothing is downloaded. Each run is a process of its own
that ends with its last step, before any validation or saving. A step's time is that between two ends of steps, the GPU
having finished. Both sides see the same 64 rows of nearly 512 tokens, 16 rows a step, 4 in one forward pass.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from options import output_file, positive

SHAPES = {  # hidden size, layers, heads, KV heads, intermediate size, vocabulary, tied embeddings
    "8b": (4096, 32, 32, 8, 14336, 128256, False),
    "1b": (2048, 16, 32, 8, 8192, 128256, True),
    "tiny": (128, 2, 4, 2, 256, 8192, True),  # tries this script out on a CPU
}
SIDES = ("dspy-lora", "plain TRL")
SLOWEST, MOST_GIB = 1.03, 16.0  # the bars: ours / TRL in step time; QLoRA's peak
WARM_UP, BATCH, MICRO, LENGTH = 3, 16, 4, 512  # steps that are not counted; rows a step and a pass; tokens
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "use_rslora": True}
RATES = {"learning_rate": 3e-4, "weight_decay": 1e-5, "lr_scheduler_type": "cosine"}
TASK = ("text -> label", "Label the text.")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = "the of and to in is was for on with he at by from his her they this have are not be one had were but".split()
PACKAGES = ("torch", "trl", "peft", "transformers", "accelerate", "bitsandbytes")


def prepare(case: dict[str, Any]) -> None:
    """Writes the random model and the rows, as text and as the token ids that both sides train on."""
    import dspy
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dspy_lora.adapters.base import SEEDLING_FOLDER
    from dspy_lora.training.data import render, tokenize

    folder = Path(case["model"])
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[case["shape"]]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SEEDLING_FOLDER / name, folder)
    tokenizer, rng, rows, tokens = AutoTokenizer.from_pretrained(folder), Random(0), [], []
    while len(rows) < 68:
        text, label, over = rng.choices(WORDS, k=LENGTH), " ".join(rng.choices(WORDS, k=40)), 1
        while over > 0:  # a word takes a token or two
            row = {"text": " ".join(text), "label": label}
            [ids], _ = tokenize(tokenizer, render(dspy.Signature(*TASK), [row]), max_length=10 * LENGTH)
            over = ids["length"] - LENGTH
            del text[len(text) - max(1, over // 2) :]
        rows.append(row)
        tokens.append({"input_ids": ids["input_ids"], "completion_mask": [int(at >= 0) for at in ids["labels"]]})
    made = {"train": rows[:64], "dev": rows[64:], "tokens": tokens[:64]}
    (folder / "rows.json").write_text(json.dumps(made), encoding="utf-8")


def ours(case: dict[str, Any], rows: dict[str, Any]) -> None:
    """Trains as ``dspy-lora train`` does. The dev rows leave no room for an answer, so no time goes into generation."""
    import dspy

    from dspy_lora.training import sft

    sft.SMALL_MODEL = 0  # the tiny shape takes the path of the large ones; they are above it in any case
    config = sft.TrainConfig(
        signature=dspy.Signature(*TASK), train=rows["train"], dev=rows["dev"],
        base=case["model"], output_dir=Path(case["folder"]), full_finetune=case["name"] == "full",
        qlora=case["name"] == "qlora", max_steps=case["steps"], eval_every=case["steps"], eval_rows=1, quiet=True,
        batch_size=BATCH, micro_batch_size=MICRO, max_length=LENGTH, target_modules=tuple(TARGETS), warmup_ratio=0.03,
        **LORA, **RATES,
    )  # fmt: skip
    sft.train(config)


def plain_trl(case: dict[str, Any], rows: dict[str, Any]) -> None:
    """Trains as TRL's documentation shows, with the same settings; full fine-tuning in float32 under autocast."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    cuda, full = torch.cuda.is_available(), case["name"] == "full"
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=torch.bfloat16 if cuda and not full else torch.float32,
        quantization_config=four_bit if case["name"] == "qlora" else None,
    )  # fmt: skip
    arguments = SFTConfig(
        output_dir=case["folder"], max_steps=case["steps"], per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO, gradient_checkpointing=True, warmup_steps=0.03, bf16=cuda,
        tf32=True if cuda else None, use_cpu=not cuda, optim="adamw_torch_fused" if cuda else "adamw_torch",
        max_length=LENGTH, completion_only_loss=True, report_to="none", save_strategy="no", **RATES,
        logging_steps=max(1, min(25, case["steps"] // 10)),
    )  # fmt: skip
    SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows["tokens"]),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=None if full else LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM"),
    ).train()  # fmt: skip


def add_timer(tokens: float) -> None:
    """Gives the trainers of this process a clock, which prints the figures at the last step and ends the process."""
    import torch
    from transformers import TrainerCallback, trainer

    cuda, ends, loading = torch.cuda.is_available(), [], []

    def clock() -> None:
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    def peak() -> list[int]:
        return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else []

    class Timer(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            loading.extend(peak())
            if cuda:
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not ends:
                clock()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            clock()
            if state.global_step < args.max_steps:
                return
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            names = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "bf16", "tf32")
            settings = {name: str(getattr(args, name)) for name in names} | {
                "gradient checkpointing": model.is_gradient_checkpointing,
                "attention": model.config._attn_implementation,
                "trained weights": sorted({str(weight.dtype) for weight in weights}),
            }
            figures = {
                "seconds": [b - a for a, b in pairwise(ends)][WARM_UP:], "tokens": tokens, "peak": peak(),
                "loading": loading, "trainable": sum(weight.numel() for weight in weights), "settings": settings,
                "device": torch.cuda.get_device_name() if cuda else "CPU",
            }  # fmt: skip
            print(json.dumps(figures), flush=True)
            os._exit(0)

    trainer.DEFAULT_CALLBACKS.append(Timer)


def work(case: dict[str, Any]) -> None:
    """One process's work: the model, or one side of one case."""
    if case["name"] == "prepare":
        prepare(case)
        print("{}")
        return
    rows = json.loads((Path(case["model"]) / "rows.json").read_text(encoding="utf-8"))
    add_timer(BATCH * statistics.mean(len(row["input_ids"]) for row in rows["tokens"]))
    try:
        {"dspy-lora": ours, "plain TRL": plain_trl}[case["side"]](case, rows)
    except RuntimeError as exc:  # torch's own and dspy-lora's
        if "out of memory" not in str(exc):
            raise
        print(json.dumps({"failed": "out of memory"}))


def run(case: dict[str, Any], timeout: int) -> dict[str, Any]:
    """Runs one case in a process and a folder of its own; what goes wrong there comes back as ``failed``."""
    folder = tempfile.mkdtemp(prefix="run-", dir=case["out"])
    command = [sys.executable, __file__, "--worker", json.dumps(case | {"folder": folder})]
    start = time.monotonic()
    hubless = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=hubless)
        errors, failed = done.stderr, f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as exc:
        errors, failed = os.fsdecode(exc.stderr or b""), f"not done after {timeout} s"
    result = {"failed": failed} if failed else json.loads(done.stdout.splitlines()[-1])
    if failed:
        print(errors[-2000:], file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return case | {"wall": time.monotonic() - start} | result


def gib(peak: list[int]) -> str:
    """Peak memory in GiB, allocated / reserved."""
    return " / ".join(f"{number / 2**30:.2f}" for number in peak) or "-"


def report(results: list[dict[str, Any]]) -> list[str]:
    """The table and the bars, line by line; repeats of a case count together."""
    memory = f"{'GiB allocated / reserved':26}{'while loading':15}"
    lines = [f"{'case':6}{'side':10}{'s/step':>8}  {'[min, max]':18}{'tokens/s':>8}  {memory}{'trainable':>13}"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, side in dict.fromkeys((each["name"], each["side"]) for each in results):
        runs = [each for each in results if (each["name"], each["side"]) == (name, side)]
        lines += [f"{name:6}{side:10}  {each['failed']}" for each in runs if "failed" in each]
        if good := [each for each in runs if "failed" not in each]:
            seconds = [second for each in good for second in each["seconds"]]
            peak, loading = max(each["peak"] for each in good), max(each["loading"] for each in good)
            median = statistics.median(seconds)
            found[name, side] = {"median": median, "peak": peak, "settings": good[0]["settings"]}
            lines.append(
                f"{name:6}{side:10}{median:8.3f}  {f'[{min(seconds):.3f}, {max(seconds):.3f}]':18}"
                f"{good[0]['tokens'] / median:8.0f}  {gib(peak):26}{gib(loading):15}{good[0]['trainable']:13,}"
            )
    for name in dict.fromkeys(name for name, _ in found):
        pair = [found[name, side] for side in SIDES if (name, side) in found]
        if len(pair) == 2:
            ratio, bar = pair[0]["median"] / pair[1]["median"], ""
            if name != "full":
                bar = f" (at most {SLOWEST}: {'holds' if ratio <= SLOWEST else 'FAILS'})"
            lines.append(f"{name}: s/step, dspy-lora / plain TRL = {ratio:.3f}{bar}")
            mine, other = (each["settings"] for each in pair)
            lines += [f"  {at}: {mine[at]}, plain TRL {other[at]}" for at in mine if mine[at] != other[at]]
    for kind, peak in zip(("allocated", "reserved"), found.get(("qlora", SIDES[0]), {}).get("peak", []), strict=False):
        lines.append(f"qlora: {kind} at most {MOST_GIB:g} GiB: {'holds' if peak <= MOST_GIB * 2**30 else 'FAILS'}")
    return lines


def main() -> None:
    """Makes the model, runs each case on both sides in turn, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--steps", type=int, default=16, help=f"the first {WARM_UP} are not counted")
    parser.add_argument("--out", type=Path, help="folder for the model and the runs")
    parser.add_argument("--cases", default="lora,qlora,full")
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument("--json", type=output_file, help="file for every figure")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    if args.out is None or args.steps <= WARM_UP or not set(args.cases.split(",")) <= {"lora", "qlora", "full"}:
        parser.error(f"--out is needed, --steps is above {WARM_UP}, --cases are of lora, qlora, full")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shared = {"shape": args.shape, "steps": args.steps, "out": str(out), "model": str(out / f"model-{args.shape}")}
    if not (out / f"model-{args.shape}" / "rows.json").is_file():
        made = run(shared | {"name": "prepare"}, timeout=300)
        if "failed" in made:
            sys.exit(f"the model could not be made: {made['failed']}")
        print(f"model made in {made['wall']:.0f} s", flush=True)
    results = []
    for repeat in range(args.repeats):
        for name in args.cases.split(","):
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                result = run(shared | {"name": name, "side": side}, 150)
                results.append(result)
                speed = result.get("failed") or f"{statistics.median(result['seconds']):.3f} s a step"
                print(f"{name}, {side}: {speed}; the process took {result['wall']:.0f} s", flush=True)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    lines = report(results)
    print(*lines, sep="\n")
    print(", ".join([*{each["device"] for each in results if "device" in each}, *map(" ".join, versions.items())]))
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "runs": results, "report": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
