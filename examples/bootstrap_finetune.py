"""DSPy's own weight optimizer on LoRALM: ``python examples/bootstrap_finetune.py``.

A teacher that knows the labels shows what the program's calls should have answered, and an adapter learns that.
"""

import argparse

import dspy

from dspy_lora import LoRALM

TASK = "Name the team that the ticket is for."
LABELS = {
    "The wifi drops every hour.": "network", "VPN will not connect.": "network", "The router is down.": "network",
    "I was charged twice.": "billing", "Where is my invoice?": "billing", "Please refund my payment.": "billing",
    "The screen is cracked.": "hardware", "My keyboard lost a key.": "hardware", "The printer jams.": "hardware",
}  # fmt: skip


class Triage(dspy.Module):
    """Names the team that a ticket is for."""

    def __init__(self, labels: dict[str, str] | None = None, task: str = TASK) -> None:
        super().__init__()
        self.labels = labels
        self.label = dspy.Predict(dspy.Signature("text -> label", task))

    def forward(self, text: str) -> dspy.Prediction:
        """Asks the LM; a program that knows the labels takes down the call and answers it itself."""
        if self.labels is None:
            return self.label(text=text)
        prediction = dspy.Prediction(label=self.labels[text])
        dspy.settings.trace.append((self.label, {"text": text}, prediction))
        return prediction


def metric(row: dspy.Example, answer: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is the label."""
    return bool(row.label == answer.label)


def main() -> None:
    """Trains the program's adapter and scores the program before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=60)
    args = parser.parse_args()
    rows = [dspy.Example(text=text, label=label).with_inputs("text") for text, label in LABELS.items()]
    evaluate = dspy.Evaluate(devset=rows, metric=metric)
    program = Triage()
    program.set_lm(LoRALM("seedling", max_tokens=100))
    print("before:", evaluate(program).score)
    settings = {"adapter": "triage", "max_steps": args.max_steps, "batch_size": 8, "learning_rate": 2e-3}
    optimizer = dspy.BootstrapFinetune(metric=metric, train_kwargs=settings)
    tuned = optimizer.compile(program, trainset=rows, teacher=Triage(LABELS))
    print(f"after: {evaluate(tuned).score} with {tuned.label.lm.adapter.ref}")


if __name__ == "__main__":
    main()
