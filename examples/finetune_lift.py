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
from options import positive

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
    show(seed, "", scores[""])
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
        show(seed, strategy, scores[strategy])
    return scores


def show(seed: int | str, strategy: str, value: float) -> None:
    """Prints one score."""
    print(f"{seed:>4}  {strategy or 'base':<14}  {value:>11.1f}", flush=True)


def strategy(word: str) -> str:
    """A strategy of BetterTogether: ``p`` and ``w`` in turn.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not set(word.split(dspy.BetterTogether.STRAT_SEP)) <= {"p", "w"}:
        raise argparse.ArgumentTypeError(
            f"{word!r}: steps are p and w, with ' -> ' between them, like {STRATEGIES[-1]!r}"
        )
    return word


def student(lm: LoRALM, task: str) -> Triage:
    """A program of one predictor that does not know the labels."""
    program = Triage(task=task)
    program.set_lm(lm)
    return program


def main() -> None:
    """Prints one line a score, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--task", default="Name the intent of the bank customer's message.")
    parser.add_argument("--registry", type=Path, default=Path("adapters"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", type=strategy, nargs="+", default=list(STRATEGIES))
    parser.add_argument("--rows", type=positive, default=4000)
    parser.add_argument("--val-rows", type=positive, default=100)
    parser.add_argument("--test-rows", type=positive, default=200)
    parser.add_argument("--max-steps", type=positive, default=400)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--demos", type=int, default=3)
    args = parser.parse_args()

    print(f"seed  {'strategy':<14}  exact match", flush=True)
    all_scores = [run(args, seed) for seed in args.seeds]
    for name in ("", *args.strategies):
        show("mean", name, statistics.mean(scores[name] for scores in all_scores))


if __name__ == "__main__":
    main()
