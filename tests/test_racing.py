import numpy as np
import pytest
from dspy_lora.optimizers.racing import Racer


def race(seed, predictors, arms, budget, chance, rows=100, telling=False, dull=0.0):
    """A race whose scores are drawn once for each assignment and row; returns it, and the best assignment."""
    rng = np.random.default_rng(seed)
    best = tuple(str(rng.integers(1, arms)) for _ in range(predictors))
    hard, drawn = rng.normal(0, 0.15, rows), {}
    hard[rng.random(rows) < dull] = 10.0  # answered right whatever the adapters

    def score(pairs):
        for assignment, row in pairs:
            if (assignment, row) not in drawn:
                right = [a == b for a, b in zip(assignment, best, strict=True)]
                drawn[assignment, row] = float(rng.random() < np.clip(chance(right) + hard[row], 0, 1))
        return [drawn[pair] for pair in pairs]

    choices = {f"p{i}": [str(arm) for arm in range(arms)] for i in range(predictors)}
    return Racer(choices, ("0",) * predictors, range(rows), score, budget, seed, telling_rows=telling).run(), best


@pytest.mark.parametrize(
    ("predictors", "budget", "chance"),
    [
        (1, 300, lambda right: 0.2 + 0.6 * np.mean(right)),
        (2, 2000, lambda right: 0.1 + 0.75 * all(right)),  # no single choice helps: only the pair does
        (3, 1500, lambda right: 0.2 + 0.65 * np.mean(right)),
    ],
    ids=["one", "a pair that must agree", "three"],
)
def test_the_winner_is_the_best_assignment_at_a_quarter_of_an_exhaustive_search(predictors, budget, chance):
    found = [race(seed, predictors, 13, budget, chance) for seed in range(20)]
    assert sum(result.ranking[0] == best for result, best in found) >= 18
    assert all(result.calls <= budget <= 0.25 * 13**predictors * 100 for result, _ in found)
    assert all(len(result.rounds) <= 12 for result, _ in found)  # each is one batch


def test_arms_that_know_every_row_keep_their_scores():
    """Few rows: the last race can ask nothing more, and what was found must not fall back to the start."""
    found = [race(seed, 2, 13, 480, lambda right: 0.1 + 0.8 * np.mean(right), rows=12) for seed in range(40)]
    assert sum(result.ranking[0] == ("0", "0") for result, _ in found) == 0
    assert sum(result.ranking[0] == best for result, best in found) >= 30


def test_the_program_as_it_is_wins_between_equals():
    result, _ = race(0, 2, 5, 400, lambda right: 10.0)
    assert result.ranking[0] == ("0", "0")


def test_a_prior_decides_between_equals():
    scores = {"p": ["0", "1", "2", "3"]}
    racer = Racer(scores, ("0",), range(20), lambda pairs: [1.0] * len(pairs), 100, 0, lambda arm: arm == ("2",))
    assert racer.run().ranking[0] == ("2",)


def test_all_arms_of_a_round_see_the_same_rows():
    seen = []

    def score(pairs):
        seen.append(pairs)
        return [0.5] * len(pairs)

    result = Racer({"p": list("abcdef")}, ("a",), range(50), score, 200).run()
    for pairs in seen:
        by_arm = {}
        for arm, row in pairs:
            by_arm.setdefault(arm, []).append(row)
        assert len({tuple(rows) for rows in by_arm.values()}) == 1
    assert result.calls <= 200


def test_one_choice_costs_nothing_and_too_small_a_budget_changes_nothing():
    assert Racer({"p": ["a"]}, ("a",), range(5), lambda pairs: [0.0], 100).run().calls == 0
    result = Racer({"p": list("abcdef")}, ("a",), range(50), lambda pairs: [0.0] * len(pairs), 5).run()
    assert result.ranking[0] == ("a",)
    assert result.calls == 0


@pytest.mark.parametrize(("budget", "dull", "least"), [(800, 0.0, -3), (1500, 0.6, 1)], ids=["all tell", "most do not"])
def test_telling_rows_help_where_most_rows_tell_nothing_and_elsewhere_do_no_harm(budget, dull, least):
    def won(telling):
        found = [
            race(seed, 3, 13, budget, lambda right: 0.1 + 0.8 * np.mean(right), telling=telling, dull=dull)
            for seed in range(30)
        ]
        return sum(result.ranking[0] == best for result, best in found)

    drawn, told = won(False), won(True)
    print(f"best assignment won: rows drawn {drawn} of 30, telling rows {told} of 30")
    assert told - drawn >= least


def test_telling_rows_come_first_after_the_screening():
    rows = [*range(50)]

    def score(pairs):
        return [1.0 if row % 2 else float(assignment[0] == "1") for assignment, row in pairs]

    racer = Racer(
        {"a": list("012"), "b": list("012"), "c": list("012")}, ("0",) * 3, rows, score, 120, telling_rows=True
    )
    racer.run()
    assert sorted(racer.rows) == rows
    assert all(row % 2 == 0 or row < 40 for row in racer.rows[:5])
    assert all(row % 2 == 1 for row in racer.rows[-5:])


def test_the_base_is_tried_for_a_predictor_that_the_screening_says_nothing_good_of():
    arms = ["none", *"abcdefghijkl"]

    def score(pairs):  # the rows at the end, which are screened, like every adapter but the base
        return [sum(arm == "a" for arm in each[:2]) + ((each[2] == "none") != (row >= 60)) for each, row in pairs]

    found = Racer(dict.fromkeys("xyz", arms), ("none",) * 3, range(80), score, 320).run()
    assert found.ranking[0] == ("a", "a", "none")
