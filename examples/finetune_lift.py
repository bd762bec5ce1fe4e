"""What DSPy's weight optimizers bring on real rows: the base model, BootstrapFinetune, BetterTogether and its halves.

    python examples/finetune_lift.py --data data/domains/customer_service/banking77 --seeds 0 1 2

``p`` is dspy.LabeledFewShot, ``w`` is dspy.BootstrapFinetune on labelled rows. Exact match on test rows, in percent.
"""

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import dspy
from bootstrap_finetune import Triage, metric

from dspy_lora import LoRALM
from dspy_lora.training.data import read_rows

STRATEGIES = ("p", "w", "p -> w", "w -> p -> w")


def examples(file: Path, count: int, seed: int) -> list[dspy.Example]:
    """Rows of a file, drawn by a seed."""
    rows = read_rows(file)
    drawn = random.Random(seed).sample(rows, min(count, len(rows)))
    return [dspy.Example(text=row["text"], label=row["label"]).with_inputs("text") for row in drawn]


def score(program: dspy.Module, rows: list[dspy.Example]) -> float:
    """Exact match in percent; an answer that cannot be parsed counts as wrong."""
    evaluate = dspy.Evaluate(devset=rows, metric=metric, num_threads=16, max_errors=len(rows) + 1)
    return float(evaluate(program).score)


def run(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Test scores of one seed: by strategy, and of the base model under the empty one."""
    train = examples(args.data / "train.jsonl", args.rows, seed)
    val = examples(args.data / "dev.jsonl", args.val_rows, seed)
    test = examples(args.data / "test.jsonl", args.test_rows, 0)
    lm = LoRALM("seedling", registry=args.registry, max_tokens=40)
    settings: dict[str, Any] = {"adapter": f"lift-{seed}", "max_steps": args.max_steps, "batch_size": args.batch_size}
    settings |= {"learning_rate": args.learning_rate, "seed": seed, "eval_every": args.max_steps, "eval_rows": 50}
    scores = {"": score(student(lm, args.task), test)}
    for strategy in args.strategies:
        optimizer = dspy.BetterTogether(
            metric=metric,
            p=dspy.LabeledFewShot(k=args.demos),
            w=dspy.BootstrapFinetune(metric=metric, train_kwargs=settings, exclude_demos=True),
        )
        best = optimizer.compile(
            student(lm, args.task),
            trainset=train,
            valset=val,
            teacher=Triage({row.text: row.label for row in train}, args.task),
            strategy=strategy,
            num_threads=16,
            seed=seed,
            shuffle_trainset_between_steps=False,  # so that strategies with an equal step share its run
        )
        if best.flag_compilation_error_occurred:
            raise SystemExit(f"{strategy}: a step failed, see the log")
        scores[strategy] = score(best, test)
    return scores


def student(lm: LoRALM, task: str) -> Triage:
    """A program of one predictor that does not know the labels."""
    program = Triage(task=task)
    program.set_lm(lm)
    return program


def main() -> None:
    """Prints one line a seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--task", default="Name the intent of the bank customer's message.")
    parser.add_argument("--registry", type=Path, default=Path("adapters"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--val-rows", type=int, default=100)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--demos", type=int, default=3)
    args = parser.parse_args()

    print(f"{'seed':>4}  {'base':>6}" + "".join(f"  {name:>11}" for name in args.strategies), flush=True)
    all_scores = []
    for seed in args.seeds:
        scores = run(args, seed)
        all_scores.append(scores)
        print(f"{seed:>4}  {scores['']:>6.1f}" + "".join(f"  {scores[s]:>11.1f}" for s in args.strategies), flush=True)
    means = [statistics.mean(scores[name] for scores in all_scores) for name in ("", *args.strategies)]
    print(f"mean  {means[0]:>6.1f}" + "".join(f"  {mean:>11.1f}" for mean in means[1:]))


if __name__ == "__main__":
    main()
