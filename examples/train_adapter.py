"""From labelled rows to a published adapter that a running engine serves: ``python examples/train_adapter.py``.

``--train FILE.jsonl`` takes rows of your own, one ``{"text": ..., "label": ...}`` a line.
"""

import argparse
from pathlib import Path

import dspy

from dspy_lora import LoRALM
from dspy_lora.training.data import read_rows
from dspy_lora.training.sft import TrainConfig, train

SIGNATURE = dspy.Signature("text -> label", "Name the team that the ticket is for.")
TEAMS = {
    "network": ["The wifi drops every hour.", "VPN will not connect.", "The office router is down."],
    "billing": ["I was charged twice.", "Where is my invoice?", "Please refund the last payment."],
    "hardware": ["The laptop screen is cracked.", "My keyboard lost a key.", "The printer jams on every page."],
}
ROWS = [{"text": text, "label": team} for team, texts in TEAMS.items() for text in texts]


def main() -> None:
    """Trains, publishes, and asks the base model and the new adapter on one engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, help="rows to train on (default: nine tickets)")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tickets"))
    args = parser.parse_args()

    rows = read_rows(args.train) if args.train else ROWS
    base = LoRALM("seedling", max_tokens=100)
    ask = dspy.Predict(SIGNATURE)
    question = rows[0]["text"]
    with dspy.context(lm=base):
        print("base model:", ask(text=question).label)  # this starts the engine

    train(
        TrainConfig(
            name="tickets", signature=SIGNATURE, train=rows, dev=rows if len(rows) < 20 else None, base="seedling",
            output_dir=args.output_dir, registry=base.registry.root, max_steps=args.max_steps, batch_size=8,
            learning_rate=2e-3,
        )
    )  # fmt: skip
    tuned = base.copy(domain="tickets")  # the engine has gone on running and loads the new revision
    with dspy.context(lm=tuned):
        print(f"{tuned.adapter.ref}:", ask(text=question).label)


if __name__ == "__main__":
    main()
