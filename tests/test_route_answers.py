"""Routing end to end: a dummy LM stands for each adapter and answers rightly in its own domain alone."""

import dspy
import pytest
from dspy.clients.engines.dummy_engine import AsyncDummyEngine, DummyEngine
from dspy.utils import DummyLM

from dspy_lora.config import DomainSection, load_config
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.route_answers import BASE, ORACLE, ROUTED, answers

ABOUT = {
    "garden": "rose, tulip, hedge, compost, seedling, prune, soil, lawn, weed, orchard",
    "kitchen": "saucepan, recipe, oven, flour, whisk, butter, simmer, garlic, roast, pastry",
}


class Engine(DummyEngine):
    """Answers with the domain's name."""

    def __init__(self, owner, domain):
        super().__init__(owner)
        self.domain = domain

    def _complete_messages(self, messages):
        self.owner.answers = {"": {"label": self.domain or "nothing"}}
        return super()._complete_messages(messages)


def make_lm(domain):
    lm = DummyLM([])
    lm._engine_spec = Engine(lm, domain)
    lm._async_engine_spec = AsyncDummyEngine(lm._engine_spec)
    return lm


@pytest.fixture(scope="module")
def config():
    sections = {name: DomainSection(task=f"Label what is said of the {name}.") for name in ABOUT}
    return load_config().model_copy(update={"domains": sections})


def test_routed_answers_stand_between_the_base_and_the_right_adapter(config):
    rows = {
        "garden": [{"text": f"when do I prune the rose {i}", "label": "garden"} for i in range(4)],
        # The last one looks like the garden.
        "kitchen": [
            {"text": text, "label": "kitchen"} for text in ("simmer the garlic", "whisk flour", "a rose hedge")
        ],
    }
    report = answers(config, rows, DomainClassifier.train(ABOUT), 0.1, make_lm=make_lm, num_threads=4)
    scores = {system.name: system.score.value for system in report.systems}
    assert scores == {BASE: 0, ROUTED: pytest.approx(6 / 7), ORACLE: 1}


def test_a_row_that_is_left_to_the_base_gets_a_program_with_its_fields(config):
    rows = {name: [{"text": words, "label": "nothing"}] for name, words in ABOUT.items()}
    report = answers(config, rows, DomainClassifier.train(ABOUT), 2.0, make_lm=make_lm, num_threads=2)
    assert report.system(ROUTED).score.value == 1


def test_a_system_that_fails_counts_as_wrong(config):
    def broken(domain):
        return make_lm(domain) if domain else dspy.LM("openai/none", api_base="http://127.0.0.1:1", num_retries=0)

    rows = {name: [{"text": f"{words} {i}", "label": name} for i in range(3)] for name, words in ABOUT.items()}
    report = answers(config, rows, DomainClassifier.train(ABOUT), 0.1, make_lm=broken, num_threads=2)
    assert report.system(BASE).score.value == 0
    assert report.system(ORACLE).score.value == 1
