"""Which predictor is rewritten next."""

from collections import Counter
from types import SimpleNamespace

from dspy_lora.optimizers.component_selector import MostWrongSelector
from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.rollouts import Rollout

CANDIDATE = {"first": "a", "second": "b"}


def rollout(**answers):
    """What the predictors did with one row, whose right answer is "yes" for each."""
    feedback = {name: "Right." if given == "yes" else "The right answer is yes." for name, given in answers.items()}
    return {
        name: [{"Inputs": {"text": "t"}, "Generated Outputs": {"label": given}, "Feedback": feedback[name]}]
        for name, given in answers.items()
    }


def drawn(rollouts):
    def records(pairs, names):
        assert (pairs, names) == (list(range(len(rollouts))), ["first", "second"])
        return rollouts

    select = MostWrongSelector(records, RuleProposer(), seed=0)
    trajectories = [(pair, Rollout(0.5)) for pair in range(len(rollouts))]

    def state(at):
        return SimpleNamespace(
            i=at,
            list_of_named_predictors=list(CANDIDATE),
            named_predictor_id_to_update_next_for_program_candidate=turns,
        )

    turns = [0]
    return [select(state(at), trajectories, [0.5] * len(rollouts), 0, CANDIDATE)[0] for at in range(40)]


def test_the_predictor_with_more_wrong_answers_is_drawn_more_often():
    mostly_second = [rollout(first="yes", second="no")] * 7 + [rollout(first="no", second="yes")]
    counts = Counter(drawn(mostly_second))
    assert counts["second"] > 2 * counts["first"] > 0


def test_a_predictor_that_is_never_wrong_is_left_alone():
    assert set(drawn([rollout(first="yes", second="no")] * 8)) == {"second"}


def test_without_a_known_mistake_they_take_turns():
    assert drawn([rollout(first="yes", second="yes")] * 8)[:4] == ["first", "second", "first", "second"]


def test_equal_minibatches_draw_the_same():
    rollouts = [rollout(first="no", second="no")] * 3
    assert drawn(rollouts) == drawn(rollouts)
