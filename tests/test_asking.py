"""Which rows GEPA asks a new candidate, and what it scores it by."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from dspy_lora.optimizers.asking import Bank, IRTEvaluationPolicy, leaders_information
from gepa.core.data_loader import ListDataLoader
from gepa.strategies.eval_policy import EvaluationPolicy
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation import simulate


def state(table):
    """GEPA's state as far as a policy reads it; NaN is a row that was not asked."""
    scores = [{row: float(score) for row, score in enumerate(line) if not np.isnan(score)} for line in table]
    return SimpleNamespace(prog_candidate_val_subscores=scores)


def drawn(systems, rows, seed, **kwargs):
    return simulate(systems, rows, seed=seed, **kwargs).responses.scores


def asked_in_turn(policy, table):
    """What a run of GEPA would ask of candidates that answer as the table says."""
    loader, now = ListDataLoader([None] * table.shape[1]), state(table[:1])
    for line in table[1:]:
        rows = policy.get_eval_batch(loader, now)
        now.prog_candidate_val_subscores.append({row: float(line[row]) for row in rows})
    return now


def test_it_is_gepa_s_protocol():
    assert isinstance(IRTEvaluationPolicy(), EvaluationPolicy)


def test_the_first_candidates_are_asked_every_row_and_then_fewer():
    now = asked_in_turn(IRTEvaluationPolicy(warm_up=4), drawn(10, 150, 0))
    counts = [len(scores) for scores in now.prog_candidate_val_subscores]
    assert counts[:4] == [150] * 4
    assert all(10 < count < 75 for count in counts[4:])


def test_few_rows_are_all_asked():
    """A standard error that all rows together do not reach is no reason to leave any out."""
    now = asked_in_turn(IRTEvaluationPolicy(), drawn(8, 20, 0))
    assert {len(scores) for scores in now.prog_candidate_val_subscores} == {20}


def test_a_smaller_standard_error_asks_more_rows():
    table = drawn(5, 200, 1)
    loader = ListDataLoader([None] * 200)
    few, some, many = (
        len(IRTEvaluationPolicy(target_se=se).get_eval_batch(loader, state(table))) for se in (0.6, 0.4, 0.3)
    )
    assert few < some < many < 200


def test_rows_that_all_candidates_answer_alike_are_left_out():
    rng = np.random.default_rng(0)
    table = np.hstack([rng.random((5, 60)) < 0.5, np.ones((5, 40)), np.zeros((5, 40))]).astype(float)
    table[np.arange(5), np.arange(5)] = 1.0
    chosen = IRTEvaluationPolicy(anchors=0).get_eval_batch(ListDataLoader([None] * 140), state(table))
    assert np.mean([row < 60 for row in chosen]) > 0.9


def test_every_later_candidate_is_asked_the_anchors():
    table = drawn(5, 100, 2)
    bank = Bank(state(table).prog_candidate_val_subscores)
    low, high = bank.fit.abilities.min(), bank.fit.abilities.max()
    names = bank.fit.items.anchors(6, float(low), float(high))
    anchors = {bank.fit.items.item(name) for name in names}
    chosen = IRTEvaluationPolicy(anchors=6, target_se=1.0).get_eval_batch(ListDataLoader([None] * 100), state(table))
    assert anchors <= set(chosen)


def test_a_row_that_came_later_is_asked():
    now, loader = state(drawn(5, 100, 3)), ListDataLoader([None] * 101)
    assert IRTEvaluationPolicy().get_eval_batch(loader, now) == list(range(101))  # nobody was asked all of them
    for scores in now.prog_candidate_val_subscores:
        scores[100] = 1.0
    assert len(IRTEvaluationPolicy().get_eval_batch(loader, now)) < 101


def test_expected_scores_are_nearer_than_those_of_as_many_random_rows_and_than_plain_means():
    errors, asked = [], []
    for seed in range(8):
        table = drawn(14, 120, seed, difficulty_sd=1.5)
        policy = IRTEvaluationPolicy()
        now = asked_in_turn(policy, table)
        scores, rng = now.prog_candidate_val_subscores, np.random.default_rng(seed)
        for index in range(policy.warm_up, 14):
            true, count = table[index].mean(), len(scores[index])
            at_random = table[index, rng.choice(120, count, replace=False)].mean()
            plain = np.mean(list(scores[index].values()))
            errors.append([policy.get_valset_score(index, now) - true, at_random - true, plain - true])
            asked.append(count / 120)
    expected, at_random, plain = np.sqrt(np.mean(np.square(errors), axis=0))
    print(f"asked {np.mean(asked):.2f}, off by {expected:.3f} (random rows {at_random:.3f}, plain mean {plain:.3f})")
    assert np.mean(asked) < 0.5
    assert expected < 0.85 * at_random < at_random < plain


def test_the_best_candidate_is_the_best_by_expectation_and_not_by_unlike_rows():
    """The second was asked the easy rows alone, and got them; the first got those and most of the hard ones."""
    easy_and_hard = np.vstack([np.r_[np.ones(30), np.ones(25), np.zeros(5)], np.r_[np.ones(30), np.zeros(30)]])
    table = np.vstack([easy_and_hard, easy_and_hard[1], np.r_[np.ones(30), np.full(30, np.nan)]])
    policy, now = IRTEvaluationPolicy(), state(table)
    assert policy.get_best_program(now) == 0
    assert policy.get_valset_score(3, now) < policy.get_valset_score(0, now)
    assert policy.get_valset_score(0, now) == pytest.approx(55 / 60)


def test_equal_candidates_go_by_rows_asked_then_by_age():
    assert IRTEvaluationPolicy().get_best_program(state(np.ones((3, 5)))) == 0


@settings(max_examples=20)
@given(st.integers(2, 7), st.integers(8, 40), st.integers(0, 10**6), st.sampled_from([1.0, 0.3]))
def test_whatever_was_scored_it_answers_with_known_rows_and_shares(systems, rows, seed, dispersion):
    table = drawn(systems, rows, seed, dispersion=dispersion)
    table[1:, 1:][np.random.default_rng(seed).random((systems - 1, rows - 1)) < 0.3] = np.nan
    now, policy = state(table), IRTEvaluationPolicy(warm_up=2)
    chosen = policy.get_eval_batch(ListDataLoader([None] * rows), now)
    assert sorted(set(chosen)) == chosen
    assert set(chosen) <= set(range(rows))
    assert all(0 <= policy.get_valset_score(index, now) <= 1 for index in range(systems))


def test_all_is_in_gepa_s_state():
    """A policy that was just made goes on as the one that saw everything."""
    table = drawn(9, 100, 4)
    old = IRTEvaluationPolicy()
    now, loader = asked_in_turn(old, table), ListDataLoader([None] * 100)
    for other in (IRTEvaluationPolicy(), copy.deepcopy(old)):
        assert other.get_eval_batch(loader, now) == old.get_eval_batch(loader, now)
        assert other.get_best_program(now) == old.get_best_program(now)
        assert [other.get_valset_score(i, now) for i in range(9)] == [old.get_valset_score(i, now) for i in range(9)]


def test_what_is_remembered_is_not_stale():
    table = drawn(5, 60, 5)
    policy, now = IRTEvaluationPolicy(), state(table)
    before = policy.get_valset_score(0, now)
    now.prog_candidate_val_subscores[0][0] = 1 - now.prog_candidate_val_subscores[0][0]
    assert policy.get_valset_score(0, now) != before


def test_scores_that_are_no_shares_are_refused_at_the_first_candidate():
    with pytest.raises(DataError, match="allowed is 0 to 1"):
        IRTEvaluationPolicy().get_eval_batch(ListDataLoader([None] * 3), state([[1.0, 7.0, 0.0]]))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"warm_up": 1}, "2 and more"), ({"anchors": -1}, "0 and more"), ({"target_se": 0.0}, "above 0")],
)
def test_settings_that_cannot_be(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        IRTEvaluationPolicy(**kwargs)


def test_the_leader_learns_from_rows_that_tell_and_not_from_those_that_never_vary():
    rng = np.random.default_rng(0)
    arms = rng.random((13, 30)) < np.linspace(0.2, 0.8, 13)[:, None]
    rows = np.hstack([arms, np.zeros((13, 10)), np.ones((13, 10))]).astype(float)
    information = leaders_information([rows, rows[::-1], rows[:1]])
    assert information.shape == (50,)
    assert information[:30].mean() > 1.5 * information[40:].mean()
