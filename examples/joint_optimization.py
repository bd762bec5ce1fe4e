"""An adapter and an instruction for each predictor of a program, chosen together.

Usage:
    python examples/joint_optimization.py [--metric-calls 300] [--save program.json]

The program sorts a customer's message and a contract's clause. Nobody tells it which adapter knows which. It has 24
rows to learn from and as many of other texts to validate on, written here; real work wants some hundred.
"""

import argparse

import dspy
from options import output_file, positive

import dspy_lora
from dspy_lora import LoRAGEPA, LoRALM

MESSAGES = {  # label: a text to learn from, one to validate on
    "card_arrival": ("My card has not arrived yet, where is it?", "I am still waiting for my new card to arrive"),
    "card_swallowed": ("The machine swallowed my card", "The ATM has eaten my card, how do I get it back?"),
    "pin_blocked": ("I forgot my PIN and am locked out", "My PIN is blocked after too many wrong tries"),
    "exchange_rate": ("What is the exchange rate you use?", "Where do your exchange rates come from?"),
    "declined_transfer": ("Why was my transfer declined?", "My transfer to a friend got declined"),
    "lost_or_stolen_phone": ("Somebody stole my phone with the app on it", "I lost my phone, is my account safe?"),
}
CLAUSES = {
    "governing law": (
        "This Agreement shall be governed by the laws of the State of New York.",
        "The laws of England and Wales apply to this Agreement and govern its interpretation.",
    ),
    "audit rights": (
        "Licensor may inspect Licensee's books and records once a year.",
        "The Company has the right to audit the Distributor's accounts upon thirty days' notice.",
    ),
    "anti assignment": (
        "Neither party may assign this Agreement without prior written consent.",
        "Distributor shall not assign or transfer its rights hereunder without the Company's consent.",
    ),
    "insurance": (
        "Licensee shall maintain commercial general liability insurance.",
        "Each party shall carry product liability insurance of at least $1,000,000.",
    ),
}


def rows(side: int) -> list[dspy.Example]:
    """Every message with every clause of one side: 0 to learn from, 1 to validate on."""
    return [
        dspy.Example(message=messages[side], clause=clauses[side], wanted=[intent, kind]).with_inputs(
            "message", "clause"
        )
        for intent, messages in MESSAGES.items()
        for kind, clauses in CLAUSES.items()
    ]


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
    parser.add_argument("--metric-calls", type=positive, default=300)
    parser.add_argument("--save", type=output_file, default="program.json")
    args = parser.parse_args()
    if args.save.suffix != ".json":
        parser.error(f"--save {args.save}: a program is saved as a .json file")
    dspy.configure(lm=LoRALM(max_tokens=64))
    names = ["customer_service", "legal", "healthcare"]
    optimizer = LoRAGEPA(metric, max_metric_calls=args.metric_calls, adapters=names)
    program = optimizer.compile(Desk(), trainset=rows(0), valset=rows(1))
    print(program.detailed_results.report())
    program.save(args.save)
    again = dspy_lora.load(Desk(), args.save)
    print(again(message="Where is my new card?", clause="The Supplier shall carry insurance.").answers)


if __name__ == "__main__":
    main()
