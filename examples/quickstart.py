"""Two adapters and the base model in one program, on one engine: ``python examples/quickstart.py``."""

import dspy

from dspy_lora import LoRALM


class Inbox(dspy.Module):
    """Labels a bank customer's message, and the clause of the contract that goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.intent = dspy.Predict(dspy.Signature("text -> label", "Name the intent of the bank customer's message."))
        self.clause = dspy.Predict(dspy.Signature("text -> label", "Name the type of the contract clause."))
        self.city = dspy.Predict(dspy.Signature("text -> city", "Which city is mentioned?"))
        base = LoRALM("seedling", max_tokens=100)  # leave the model out to take the configured one
        self.intent.lm = base.copy(domain="customer_service")
        self.clause.lm = base.copy(domain="legal")
        self.city.lm = base

    def forward(self, message: str, clause: str) -> dspy.Prediction:
        """Three calls: two adapters, and the base model for what needs none."""
        return dspy.Prediction(
            intent=self.intent(text=message).label,
            city=self.city(text=message).city,
            clause=self.clause(text=clause).label,
        )


if __name__ == "__main__":
    inbox = Inbox()
    print(
        inbox(
            message="My card has not arrived in London yet.", clause="This Agreement is governed by the laws of Ohio."
        )
    )
