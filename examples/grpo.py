"""dspy.GRPO on the bundled seedling: its mean reward by step, on rules that decide the answer. Runs on a CPU.

    python examples/grpo.py [--steps 30] [--seed 0] [--registry DIR]

8 answers to each of 4 messages a step: the right team is worth 1, another 0, what DSPy cannot read -1.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

import dspy
from dspy.teleprompt.grpo import GRPO

from dspy_lora import LoRALM

WORDS = {
    "delivery": ("parcel", "courier"),
    "billing": ("invoice", "refund"),
    "account": ("password", "login"),
    "repairs": ("screen", "battery"),
    "travel": ("ticket", "hotel"),
}
RULES = " ".join(f"If it mentions {' or '.join(words)}, answer {team}." for team, words in WORDS.items())
TRAIN = ("The {} from Monday is missing.", "Hello, who can help me with the {}?", "I asked about the {} twice.")
TEST = ("Please look at the {} once more.", "Nobody told me that the {} had changed.")


def examples(sentences: tuple[str, ...]) -> list[dspy.Example]:
    """Every sentence with every word, and the team that answers."""
    rows = [(text.format(word), team) for text in sentences for team, words in WORDS.items() for word in words]
    return [dspy.Example(message=message, team=team).with_inputs("message") for message, team in rows]


def is_right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
    """1 for the right team."""
    return float(prediction.team == example.team)


def greedy_score(program: dspy.Predict, rows: list[dspy.Example]) -> float:
    """Share of right answers at temperature 0."""
    greedy = program.deepcopy()
    greedy.set_lm(program.lm.copy(temperature=0.0))
    return dspy.Evaluate(devset=rows, metric=is_right, num_threads=16, display_progress=False)(greedy).score / 100


def main() -> None:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(description="dspy.GRPO on the bundled seedling")
    for flag, default in (("--steps", 30), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--registry", type=Path, default=Path("adapters"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = dspy.Predict(dspy.Signature("message -> team", RULES))
        program.set_lm(LoRALM("seedling", registry=args.registry, temperature=1.3, max_tokens=24))
        before = greedy_score(program, examples(TEST))
        optimizer = GRPO(
            metric=is_right,
            num_train_steps=args.steps,
            num_dspy_examples_per_grpo_step=4,
            num_rollouts_per_grpo_step=8,
            num_threads=32,
            exclude_demos=True,
            seed=args.seed,
            train_kwargs={"learning_rate": 1e-4, "seed": args.seed, "output_dir": folder},
        )
        program = optimizer.compile(program, trainset=examples(TRAIN))
        [metrics] = Path(folder).glob("*/metrics.jsonl")
        rewards = [json.loads(line)["reward"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    for first in range(0, len(rewards), 5):
        print(f"steps from {first + 1:>3}   mean reward {fmean(rewards[first : first + 5]):+.3f}")
    print(f"held-out, greedy: {before:.2f} -> {greedy_score(program, examples(TEST)):.2f} with {program.lm.ref}")


if __name__ == "__main__":
    main()
