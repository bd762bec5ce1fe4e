"""``dspy-lora demo``: questions of twelve domains in one batch; then the programs saved, loaded and asked again.

The questions are written for this demo; no training set holds them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import dspy

from dspy_lora.config import PACKAGED, load_config
from dspy_lora.lm import LoRALM
from dspy_lora.saved import load

QUESTIONS: dict[str, tuple[str, str]] = {
    "financial": (
        "What was the percentage change in net sales from 2020 to 2021?",
        "Which segments does the company report?",
    ),
    "legal": (
        "This Agreement shall be governed by the laws of the State of Delaware.",
        "Neither party may assign this Agreement without the prior written consent of the other party.",
    ),
    "healthcare": (
        "Signs of the disease include fever, a dry cough and a loss of appetite.",
        "Mutations in the gene cause the condition; the altered protein no longer works.",
    ),
    "marketing": ("light, easy to carry, great battery", "the zipper broke after a week, poor stitching"),
    "manufacturing": ("replace cracked windscreen on cab", "oil leak on left hand final drive"),
    "real_estate": (
        "I am looking for a two bedroom apartment in Oakland.",
        "Can I come and look at the place next Tuesday?",
    ),
    "education": (
        "What is the derivative of x squared plus three x?",
        "Which enzyme unwinds the double helix during DNA replication?",
    ),
    "analytics": ("How many games were played in March?", "What is the lowest rank of the player from Spain?"),
    "operations": (
        "hi please reset my password for the reporting portal thanks",
        "request to buy new monitor and keyboard for new starter please approve purchase order",
    ),
    "customer_service": (
        "My card was swallowed by the machine, what now?",
        "How long does it take until my new card is here?",
    ),
    "research": (
        "We followed the protocol of Miller et al. to extract the RNA.",
        "These findings agree with those of earlier trials.",
    ),
    "specialized": (
        "The malware writes itself to a registry run key to start at every log-on.",
        "The attackers sent an e-mail with a malicious attachment.",
    ),
}
_WIDTH = 62  # characters of a question that the table shows


class Desk(dspy.Module):
    """One predictor a domain, each on its own adapter.

    Args:
        lm: The base model; every predictor gets a copy of it bound to its domain's adapter.
    """

    def __init__(self, lm: LoRALM) -> None:
        super().__init__()
        config = load_config(PACKAGED)  # the bundled adapters' own tasks, whatever the user's say
        self.domains: dict[str, dspy.Predict] = {}
        for name in QUESTIONS:
            self.domains[name] = dspy.Predict(config.domain(name).signature())
            self.domains[name].lm = lm.copy(domain=name)

    def forward(self, domain: str, text: str) -> dspy.Prediction:
        """Answers a text with its domain's predictor."""
        return self.domains[domain](text=text)


def ask(desk: Desk) -> list[str]:
    """Asks all questions side by side."""
    pairs = [(desk, dspy.Example(domain=name, text=text).with_inputs("domain", "text")) for name, text in _listed()]
    parallel = dspy.Parallel(num_threads=len(pairs), disable_progress_bar=True, provide_traceback=False)
    return [prediction.label for prediction in parallel(pairs)]


def _listed() -> list[tuple[str, str]]:
    return [(name, text) for name, texts in QUESTIONS.items() for text in texts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo has no flags."""


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0; 1 where the loaded program answers something else than the saved one.
    """
    lm = LoRALM("seedling", max_tokens=100, cache=False)
    desk = Desk(lm)
    lm.preload()
    began = time.monotonic()
    answers = ask(desk)
    seconds = time.monotonic() - began
    print(f"\n{'domain':<17} {'adapter revision':<30} {'question':<{_WIDTH}} answer")
    for (name, text), answer in zip(_listed(), answers, strict=True):
        shown = text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
        print(f"{name:<17} {desk.domains[name].lm.adapter.ref:<30} {shown:<{_WIDTH}} {answer}")
    print(
        f"\n{len(answers)} calls to {len(QUESTIONS)} adapters in one batch: {seconds:.1f} s, adapter loading included."
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "desk.json"
        desk.save(path)
        again = ask(load(Desk(lm), path))
    same = sum(before == after for before, after in zip(answers, again, strict=True))
    print(f"Saved, loaded and asked again: {same} of {len(answers)} answers are the same.")
    return 0 if same == len(answers) else 1
