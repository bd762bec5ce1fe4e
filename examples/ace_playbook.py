"""What a playbook is worth to the seedling: the same program with and without it, on rows that it never saw.

Usage:
    python examples/ace_playbook.py [--seeds 3] [--train 120] [--test 100] [--save playbook.md]

A handful of keywords decides each row's label, other ones for each seed. The program knows the labels and nothing of
the keywords; ACE reads them out of recorded feedback, by counting, without a language model to reflect.
"""

import argparse
import statistics
from random import Random
from typing import Literal

import dspy
from dspy_lora.optimizers.ace import ACE
from options import positive

from dspy_lora import LoRALM
from dspy_lora.seedling.rules import apply_rules, make_rules
from dspy_lora.seedling.sentences import Texts


def task(seed: int, count: int) -> tuple[type[dspy.Signature], list[dspy.Example]]:
    """Rows whose labels rules decide, in words that the seedling was not trained on.

    Args:
        seed: Decides rules and rows.
        count: How many rows.

    Returns:
        The signature, which names the labels and no rule, and the rows, no text twice.
    """
    rng, texts = Random(seed), Texts()
    rules = make_rules(rng, "heldout", texts, "text", "label", fewest=4, most=4, top=2)
    rules.ordered = False
    signature = dspy.Signature({"text": (str, dspy.InputField())}, "Label the text.")
    signature = signature.append("label", dspy.OutputField(), Literal[tuple(rules.labels)])
    rows: dict[str, dspy.Example] = {}
    while len(rows) < count:
        text, label, _ = apply_rules(rng, "heldout", texts, rules, "text", "label")
        rows[text] = dspy.Example(text=text, label=label).with_inputs("text")
    return signature, list(rows.values())


def metric(gold: dspy.Example, pred: dspy.Prediction, trace: object = None) -> dspy.Prediction:
    """Whether the label is right, and which one would have been."""
    right = pred.label == gold.label
    return dspy.Prediction(score=float(right), feedback="Right." if right else f"The right answer is {gold.label}.")


def score(program: dspy.Module, rows: list[dspy.Example], threads: int) -> float:
    """Share of right answers, in percent; one that cannot be parsed is wrong."""

    def exact(gold: dspy.Example, pred: dspy.Prediction, trace: object = None) -> bool:
        return pred.label == gold.label

    evaluate = dspy.Evaluate(
        devset=rows, metric=exact, num_threads=threads, max_errors=len(rows) + 1, provide_traceback=False
    )
    return float(evaluate(program).score)


def main() -> None:
    """Learns one playbook a seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--train", type=positive, default=120, help="rows to learn from")
    parser.add_argument("--test", type=positive, default=100, help="held-out rows")
    parser.add_argument("--threads", type=positive, default=16)
    parser.add_argument("--save", help="where the last seed's playbook goes, as Markdown")
    args = parser.parse_args()
    dspy.configure(lm=LoRALM("seedling", max_tokens=32, cache=False))
    table = []
    for seed in range(args.seeds):
        signature, rows = task(seed, args.train + args.test)
        train, test = rows[: args.train], rows[args.train :]
        program = dspy.Predict(signature)
        learned = ACE(metric, batch_size=16, num_threads=args.threads, seed=seed).compile(program, trainset=train)
        before, after = (score(each, test, args.threads) for each in (program, learned))
        table.append((seed, before, after, after - before, len(learned.playbook)))
    print("seed  as it is  with playbook   gain  bullets")
    for seed, before, after, gain, bullets in table:
        print(f"{seed:4}  {before:7.1f}%  {after:12.1f}%  {gain:+5.1f}  {bullets:7}")
    for name, fold in (("mean", statistics.mean), ("sd", statistics.stdev)):
        if len(table) > 1:
            before, after, gain = (fold(row[at] for row in table) for at in (1, 2, 3))
            print(f"{name:4}  {before:7.1f}   {after:12.1f}   {gain:+5.1f}")
    print(learned.playbook.prompt())
    if args.save:
        learned.playbook.save(args.save)


if __name__ == "__main__":
    main()
