"""An adapter and an instruction for each predictor of a program, chosen together.

Usage:
    python examples/joint_optimization.py [--metric-calls 300] [--save program.json]

The program sorts a customer's message and a contract's clause. Nobody tells it which adapter knows which. It has 24
rows to learn from, written here; real work wants some hundred.
"""

import argparse

import dspy

import dspy_lora
from dspy_lora import LoRAGEPA, LoRALM

MESSAGES = {
    "My card has not arrived yet, where is it?": "card_arrival",
    "The machine swallowed my card": "card_swallowed",
    "I forgot my PIN and am locked out": "pin_blocked",
    "What is the exchange rate you use?": "exchange_rate",
    "Why was my transfer declined?": "declined_transfer",
    "Somebody stole my phone with the app on it": "lost_or_stolen_phone",
}
CLAUSES = {
    "This Agreement shall be governed by the laws of the State of New York.": "governing law",
    "This Agreement is made as of the 3rd day of March 2018.": "agreement date",
    "Neither party may assign this Agreement without prior written consent.": "anti-assignment",
    "Licensee shall maintain commercial general liability insurance.": "insurance",
}


class Desk(dspy.Module):
    """Sorts a message and a clause."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.clause = dspy.Predict("text -> label"), dspy.Predict("text -> label")

    def forward(self, message: str, clause: str) -> dspy.Prediction:
        """A label for each."""
        return dspy.Prediction(answers=[self.message(text=message).label, self.clause(text=clause).label])


def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):  # noqa: ANN001, ANN201
    """Share of right labels, and for each predictor what it should have said."""
    right = [given == wanted for given, wanted in zip(pred.answers, gold.wanted, strict=True)]
    wanted = gold.wanted[1 if pred_name == "clause" else 0]
    return dspy.Prediction(score=sum(right) / 2, feedback=f"The right answer is {wanted}.")


def main() -> None:
    """Compiles, saves, loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metric-calls", type=int, default=300)
    parser.add_argument("--save", default="program.json")
    args = parser.parse_args()
    rows = [
        dspy.Example(message=m, clause=c, wanted=[MESSAGES[m], CLAUSES[c]]).with_inputs("message", "clause")
        for m in MESSAGES
        for c in CLAUSES
    ]
    dspy.configure(lm=LoRALM(max_tokens=64))
    names = ["customer_service", "legal", "healthcare"]
    optimizer = LoRAGEPA(metric, max_metric_calls=args.metric_calls, adapters=names)
    program = optimizer.compile(Desk(), trainset=rows[::2], valset=rows[1::2])
    print(program.detailed_results.report())
    program.save(args.save)
    again = dspy_lora.load(Desk(), args.save)
    print(again(message="Where is my new card?", clause="The Supplier shall carry insurance.").answers)


if __name__ == "__main__":
    main()
