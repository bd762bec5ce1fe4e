"""Item response theory: the likelihood against plain quadrature, recovery, adaptive tests, what goes in and out."""

import json
import subprocess
import sys

import dspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation import (
    AdaptiveTest,
    IRTFit,
    Items,
    Responses,
    fit_irt,
    held_out_fit,
    marginal,
    simulate,
    suspicious_items,
)
from dspy_lora.evaluation.held_out import auc, calibration_error, log_loss
from dspy_lora.evaluation.marginal import ABILITY_SD, DIFFICULTY_SPREAD, DISCRIMINATION_SPREAD, MarginalLikelihood
from dspy_lora.evaluation.suspects import point_biserial
from dspy_lora.evaluation.systems import SystemsReport

NAN = float("nan")
NORMAL_95 = 1.96


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def covered(estimate, truth, error):
    return float(np.mean(np.abs(estimate - truth) < NORMAL_95 * error))


@pytest.fixture(scope="module")
def twelve():
    return simulate(12, 600, seed=3)


@pytest.fixture(scope="module")
def twelve_fit(twelve):
    return fit_irt(twelve.responses)


# -- the likelihood, against a direct computation ----------------------------------------------------------------------

PARAMETERS = np.array([0.9, -0.4, 0.1, 1.6, np.log(1.3), np.log(0.5)])
SCORES = np.array(
    [
        [1, 1, 0, 1, NAN, 1, 0.3],
        [0, 1, 0, NAN, 0, 1, 0.8],
        [1, 0, 0, NAN, 1, 1, 0.5],
        [1, 1, 0, NAN, 1, NAN, 1.0],
    ]
)


def direct(item, parameters, dispersion=1.0):
    """One item's integral by the midpoint rule over (b, log a), written out: its value, mean and covariance."""
    sigma_b, sigma_a = np.exp(parameters[4:])
    b, log_a = np.meshgrid(np.linspace(-8, 8, 801) * sigma_b, np.linspace(-8, 8, 401) * sigma_a, indexing="ij")
    density = np.exp(-((b / sigma_b) ** 2 + (log_a / sigma_a) ** 2) / 2)
    density /= density.sum()
    for ability, x in zip(parameters, SCORES[:, item], strict=False):
        if not np.isnan(x):
            p = sigmoid(np.exp(log_a) * (ability - b))
            density = density * (p**x * (1 - p) ** (1 - x)) ** (1 / dispersion)
    weights = density / density.sum()
    mean = np.array([(weights * b).sum(), (weights * log_a).sum()])
    away = np.array([b - mean[0], log_a - mean[1]])
    return np.log(density.sum()), mean, np.einsum("uij,vij,ij->uv", away, away, weights)


@pytest.fixture
def fine_grid(monkeypatch):
    """The sum over nodes as exact as the direct computation."""
    monkeypatch.setattr(marginal, "_SPACING", 0.5)


def likelihood(slopes=True, dispersion=1.0):
    return MarginalLikelihood(SCORES, slopes=slopes, dispersion=dispersion, spreads=(1.3, 0.5))


@pytest.mark.parametrize("dispersion", [1.0, 0.4])
def test_marginal_likelihood_is_the_integral_over_items(fine_grid, dispersion):
    found = likelihood(dispersion=dispersion).log_marginal(PARAMETERS)
    assert found == pytest.approx([direct(j, PARAMETERS, dispersion)[0] for j in range(7)], abs=1e-5)


def test_objective_adds_the_priors(fine_grid):
    value, _ = likelihood()(PARAMETERS)
    spread = [(np.log(m), sd) for m, sd in (DIFFICULTY_SPREAD, DISCRIMINATION_SPREAD)]
    prior = ((PARAMETERS[:4] / ABILITY_SD) ** 2).sum() / 2
    prior += sum(((x - m) / sd) ** 2 / 2 for x, (m, sd) in zip(PARAMETERS[4:], spread, strict=True))
    assert value * 7 == pytest.approx(prior - sum(direct(j, PARAMETERS)[0] for j in range(7)), abs=1e-5)


@pytest.mark.parametrize("slopes", [True, False])
def test_gradient_and_information_are_the_derivatives(fine_grid, slopes):
    f = likelihood(slopes, dispersion=0.7)
    x = PARAMETERS[: 5 + slopes]
    steps = 1e-4 * np.eye(len(x))
    gradient = [(f(x + h)[0] - f(x - h)[0]) / 2e-4 for h in steps]
    assert f(x)[1] == pytest.approx(gradient, abs=1e-6)
    hessian = np.array([(f(x + h)[1] - f(x - h)[1]) / 2e-4 for h in steps]) * 7
    assert np.linalg.inv(f.covariance(x)) == pytest.approx(hessian, abs=5e-3)


def test_items_posterior_is_the_integral_plus_the_delta_method(fine_grid):
    found = likelihood().items(PARAMETERS, np.zeros((6, 6)))
    for j in range(7):
        _, mean, covariance = direct(j, PARAMETERS)
        assert found.mean[j] == pytest.approx(mean, abs=1e-5)
        assert found.covariance[j] == pytest.approx(covariance, abs=1e-4)
    moved = likelihood().items(PARAMETERS, np.diag([0, 0.04, 0, 0, 0, 0.0]))
    steps = [likelihood().items(PARAMETERS + h * np.eye(6)[1], np.zeros((6, 6))).mean for h in (1e-4, -1e-4)]
    slope = (steps[0] - steps[1]) / 2e-4
    assert moved.covariance - found.covariance == pytest.approx(0.04 * slope[:, :, None] * slope[:, None], abs=1e-6)


def test_the_grid_as_it_is_comes_close():
    found = likelihood().items(PARAMETERS, np.zeros((6, 6)))
    assert found.mean == pytest.approx(np.array([direct(j, PARAMETERS)[1] for j in range(7)]), abs=0.005)


def test_two_systems_in_the_rasch_model_agree_with_conditional_maximum_likelihood():
    # The difference's conditional estimate is log(n10 / n01), whatever the items (Rasch 1960; McNemar).
    counts = {(1, 1): 700, (1, 0): 420, (0, 1): 180, (0, 0): 700}
    scores = np.array([pair for pair, count in counts.items() for _ in range(count)]).T
    found = fit_irt(Responses.from_matrix(scores), "rasch").compare("system-0", "system-1")
    assert found.difference == pytest.approx(np.log(420 / 180), abs=0.02)
    assert found.standard_error == pytest.approx(np.sqrt(1 / 420 + 1 / 180), rel=0.03)
    assert found.probability > 0.999


# -- recovery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("systems, model", [(12, "2pl"), (5, "rasch")])
def test_parameters_are_recovered_with_honest_intervals(systems, model):
    hits = []
    for seed in range(25):
        made = simulate(systems, 200, seed=seed, missing=0.1, log_discrimination_sd=0.4 if model == "2pl" else 0)
        fit = fit_irt(made.responses)
        assert fit.model == model
        errors = np.sqrt(fit.items.covariance[:, 1, 1])
        hits.append(
            [
                covered(fit.abilities, made.abilities, fit.standard_errors),
                covered(fit.items.difficulty, made.difficulty, fit.items.difficulty_se),
                covered(fit.items.log_discrimination, np.log(made.discrimination), errors) if model == "2pl" else 0.95,
            ]
        )
    abilities, difficulty, discrimination = np.mean(hits, axis=0)
    assert 0.88 < abilities <= 1  # 25 seeds leave an error of about 2 points; examples/irt_recovery.py narrows it
    assert 0.93 < difficulty < 0.97
    assert 0.93 < discrimination < 0.97


def test_estimates_are_close_to_the_truth(twelve, twelve_fit):
    assert np.abs(twelve_fit.abilities - twelve.abilities).max() < 4 * twelve_fit.standard_errors.max()
    assert np.corrcoef(twelve_fit.items.difficulty, twelve.difficulty)[0, 1] > 0.8
    assert twelve_fit.difficulty_sd == pytest.approx(1.5, abs=0.25)
    assert twelve_fit.log_discrimination_sd == pytest.approx(0.4, abs=0.2)
    assert twelve_fit.warnings == ()


def test_graded_scores_give_the_dispersion_and_narrower_intervals():
    made = simulate(10, 300, seed=1, dispersion=0.25)
    fit = fit_irt(made.responses)
    assert fit.items.dispersion == pytest.approx(0.25, abs=0.04)
    assert covered(fit.items.difficulty, made.difficulty, fit.items.difficulty_se) > 0.9
    rounded = fit_irt(Responses.from_matrix(made.responses.scores > 0.5))
    assert fit.items.difficulty_se.mean() < rounded.items.difficulty_se.mean()


def test_more_items_narrow_an_ability_and_few_systems_widen_the_items(twelve, twelve_fit):
    few = fit_irt(twelve.responses.select(twelve.responses.systems[:3]))
    assert few.items.difficulty_se.mean() > 1.2 * twelve_fit.items.difficulty_se.mean()
    part = Responses.from_matrix(twelve.responses.scores[:, :60])
    assert fit_irt(part).standard_errors.mean() > 2 * twelve_fit.standard_errors.mean()


cells = st.sampled_from([0.0, 1.0, 1.0, 0.0, 0.5, NAN])


@given(st.tuples(st.integers(2, 5), st.integers(1, 7)).flatmap(lambda shape: arrays(np.float64, shape, elements=cells)))
@settings(max_examples=30)
def test_any_matrix_gives_finite_figures_that_follow_its_symmetries(scores):
    known = ~np.isnan(scores)
    scores[~known.any(1)] = 1.0
    scores[:, np.isnan(scores).all(0)] = 0.0
    fit = fit_irt(Responses.from_matrix(scores), "2pl")
    figures = (fit.abilities, fit.standard_errors, fit.items.difficulty_se, fit.items.discrimination_se)
    assert all(np.isfinite(figure).all() for figure in figures)
    assert (fit.standard_errors > 0).all()
    other = fit_irt(Responses.from_matrix(1 - scores[::-1]), "2pl")  # wrong for right turns the scale about
    assert other.abilities[::-1] == pytest.approx(-fit.abilities, abs=2e-3)
    assert other.items.difficulty == pytest.approx(-fit.items.difficulty, abs=2e-3)


# -- honesty -----------------------------------------------------------------------------------------------------------


def test_few_systems_get_rasch_and_a_warning(twelve, caplog):
    fit = fit_irt(twelve.responses.select(twelve.responses.systems[:7]))
    assert fit.model == "rasch"
    assert (fit.items.discrimination == 1).all()
    assert "7 systems say little about single items" in fit.warnings[0]
    assert fit.warnings[0] in caplog.text
    assert fit_irt(twelve.responses.select(twelve.responses.systems[:8])).model == "2pl"


def test_systems_that_are_all_alike_get_rasch_and_finite_figures():
    responses = Responses.from_matrix(np.random.default_rng(0).random((30, 20)) < 0.5)
    fit = fit_irt(responses)
    assert fit.model == "rasch"
    assert "2PL comes to no estimate on these scores" in " ".join(fit.warnings)
    assert (fit.standard_errors > 0.1).all()
    report = SystemsReport("legal", "test.jsonl", responses, fit, tuple(suspicious_items(responses, fit)))
    assert all(each["standard_error"] > 0.1 for each in json.loads(report.to_json())["systems"])


def test_a_2pl_fit_that_came_to_no_estimate_says_so_and_writes_no_nan(monkeypatch):
    made = simulate(8, 12, seed=1)
    monkeypatch.setattr(MarginalLikelihood, "covariance", lambda *_: np.diag([-0.1] + [0.1] * 9))
    fit = fit_irt(made.responses, "2pl")
    assert fit.model == "2pl"
    assert "not positive definite" in fit.warnings[-1]
    assert np.isnan(fit.standard_errors).tolist() == [True] + [False] * 7
    systems = json.loads(SystemsReport("legal", "test.jsonl", made.responses, fit, ()).to_json())["systems"]
    assert {each["system"]: each["standard_error"] for each in systems}["system-0"] is None


def test_what_the_data_cannot_say_is_said():
    scores = np.full((8, 20), NAN)
    scores[:4, :10] = np.tile([1, 0], 5)
    scores[4:, 10:] = np.tile([0, 1], 5)
    scores[0, :10] = 1
    warnings = " ".join(fit_irt(Responses.from_matrix(scores)).warnings)
    assert "20 items" in warnings
    assert "every score of 'system-0' is 1" in warnings
    assert "groups without a common item" in warnings


def test_a_model_or_system_that_is_not_there(twelve, twelve_fit):
    with pytest.raises(ConfigError, match=r"'3pl'.*'rasch' and '2pl'"):
        fit_irt(twelve.responses, "3pl")
    with pytest.raises(DataError, match="at least two systems"):
        fit_irt(twelve.responses.select(["system-1"]))
    with pytest.raises(DataError, match=r"no system 'system-99'. Did you mean 'system-9'"):
        twelve_fit.compare("system-1", "system-99")


def test_comparison_and_ranking(twelve, twelve_fit):
    best, worst = twelve_fit.ranking()[0], twelve_fit.ranking()[-1]
    found = twelve_fit.compare(best, worst)
    assert found.difference == pytest.approx(twelve_fit.ability(best)[0] - twelve_fit.ability(worst)[0])
    assert found.probability > 0.99
    assert twelve_fit.compare(worst, best).probability == pytest.approx(1 - found.probability)
    assert twelve_fit.compare(best, best).probability == 0.5
    apart = np.hypot(twelve_fit.ability(best)[1], twelve_fit.ability(worst)[1])
    assert found.standard_error != pytest.approx(apart, rel=1e-3)  # the shared part cancels


# -- items -------------------------------------------------------------------------------------------------------------


def known_items(difficulty, discrimination, **kwargs):
    names = tuple(f"i{j}" for j in range(len(difficulty)))
    exact = np.zeros((len(names), 2, 2))
    return Items(names, names, np.array(difficulty, float), np.log(discrimination), exact, **kwargs)


def test_information_of_known_items_is_the_formula():
    items = known_items([0.0, 1.0], [1.0, 2.0], dispersion=0.5)
    p = sigmoid(np.array([[0.3], [2.0]]) * 1.0 - np.array([[0.0], [2.6]]))
    p[0], p[1] = sigmoid(0.3), sigmoid(2 * (0.3 - 1))
    assert items.probability(0.3) == pytest.approx(p)
    assert items.information(0.3) == pytest.approx(np.array([[1.0], [4.0]]) * p * (1 - p) / 0.5)


def test_probability_is_the_mean_over_an_items_uncertain_parameters():
    covariance = np.array([[0.5, 0.15], [0.15, 0.2]])
    items = Items(("i",), ("i",), np.array([1.0]), np.array([0.3]), covariance[None])
    b, log_a = np.random.default_rng(0).multivariate_normal([1.0, 0.3], covariance, 400_000).T
    sampled = [sigmoid(np.exp(log_a) * (theta - b)).mean() for theta in (-1.0, 0.5, 2.0)]
    assert items.probability([-1.0, 0.5, 2.0])[0] == pytest.approx(sampled, abs=0.003)


def test_uncertain_items_answer_nearer_to_one_half_and_tell_less(twelve_fit):
    items = twelve_fit.items
    certain = known_items(items.difficulty, items.discrimination)
    theta = np.linspace(-1, 2, 4)
    assert np.abs(items.probability(theta) - 0.5).mean() < np.abs(certain.probability(theta) - 0.5).mean()
    assert items.information(theta).mean() < certain.information(theta).mean()
    step = (items.probability(theta + 1e-5) - items.probability(theta - 1e-5)) / 2e-5
    p = items.probability(theta)
    assert items.information(theta) == pytest.approx(step**2 / (p * (1 - p)), rel=1e-4)


def test_a_graded_score_varies_by_its_items_uncertainty_too():
    covariance = np.array([[0.5, 0.15], [0.15, 0.2]])
    items = Items(("i",), ("i",), np.array([1.0]), np.array([0.3]), covariance[None], dispersion=0.05)
    random = np.random.default_rng(0)
    b, log_a = random.multivariate_normal([1.0, 0.3], covariance, 400_000).T
    p = sigmoid(np.exp(log_a) * (0.2 - b))
    scores = random.beta(19 * p, 19 * (1 - p))  # of variance 0.05 p (1 - p)
    slope = (np.exp(log_a) * p * (1 - p)).mean()
    assert items.information(0.2)[0] == pytest.approx(slope**2 / scores.var(), rel=0.02)


def test_telling_items_and_anchors(twelve_fit):
    first, *_ = twelve_fit.telling_items(3)
    information = twelve_fit.items.information(twelve_fit.abilities).mean(1)
    assert information[twelve_fit.items.item(first)] == information.max()
    anchors = twelve_fit.items.anchors(5, -1.5, 2.5)
    assert len(set(anchors)) == 5
    at = twelve_fit.items.difficulty[[twelve_fit.items.item(name) for name in anchors]]
    assert at[0] < at[-1]
    with pytest.raises(DataError, match="allowed is 1 to 600"):
        twelve_fit.items.anchors(601, 0, 1)
    assert twelve_fit.items.select(anchors).difficulty == pytest.approx(at)


# -- held-out cells ----------------------------------------------------------------------------------------------------


def test_held_out_cells_are_predicted(twelve):
    found = held_out_fit(twelve.responses, seed=1)
    assert (found.model, found.cells) == ("2pl", 720)
    assert 0.75 < found.auc < 0.9
    assert found.calibration_error < 0.06
    assert found.log_loss < found.baseline_log_loss - 0.05
    assert found == held_out_fit(twelve.responses, seed=1)


def test_held_out_figures_are_the_known_ones():
    random = np.random.default_rng(0)
    p = random.random(300).round(2)  # with ties
    x = (random.random(300) < p).astype(float)
    above = p[x == 1][:, None] - p[x == 0]
    assert auc(x, p) == pytest.approx(((above > 0) + (above == 0) / 2).mean())
    assert log_loss(np.array([1.0, 0.25]), np.array([0.5, 0.2])) == pytest.approx(
        -(np.log(0.5) + 0.25 * np.log(0.2) + 0.75 * np.log(0.8)) / 2
    )
    assert calibration_error(np.repeat([0.0, 1.0], 50), np.repeat([0.2, 0.7], 50)) == pytest.approx(0.25)
    assert auc(np.array([0.5, 0.5]), np.array([0.1, 0.9])) == 0.5
    assert np.isnan(auc(np.ones(2), np.array([0.1, 0.9])))


def test_held_out_refuses_what_it_cannot_do(twelve):
    with pytest.raises(ConfigError, match=r"share=0\.9"):
        held_out_fit(twelve.responses, share=0.9)
    diagonal = np.full((3, 3), NAN)
    np.fill_diagonal(diagonal, 1)
    with pytest.raises(DataError, match="no cell can be held out"):
        held_out_fit(Responses.from_matrix(diagonal))
    assert held_out_fit(Responses.from_matrix([[1, 0], [0, 1]])).cells == 1  # a tenth of four cells is less than one


# -- items that look mislabelled ---------------------------------------------------------------------------------------


def test_mislabelled_items_are_found():
    made = simulate(30, 300, seed=2)
    scores = made.responses.scores.copy()
    scores[:, :15] = 1 - scores[:, :15]
    responses = Responses.from_matrix(scores)
    found = suspicious_items(responses, fit_irt(responses))
    hits = [suspect for suspect in found if int(suspect.item.split("-")[1]) < 15]
    assert len(hits) >= 8
    assert len(hits) >= 0.8 * len(found)
    assert found[0].point_biserial < 0
    assert [s.probability for s in found] == sorted((s.probability for s in found), reverse=True)


def test_three_systems_accuse_no_item():
    made = simulate(3, 200, seed=2)
    assert suspicious_items(made.responses, fit_irt(made.responses)) == []


def test_point_biserial_is_the_correlation_with_the_rest(twelve):
    scores = twelve.responses.scores[:, :40].copy()
    scores[3, 7] = NAN
    kept = ~np.isnan(scores[:, 7])
    rest = np.nanmean(np.delete(scores, 7, axis=1), axis=1)
    found = point_biserial(scores)
    assert found[7] == pytest.approx(np.corrcoef(scores[kept, 7], rest[kept])[0, 1])
    assert np.isnan(point_biserial(np.ones((4, 3)))).all()


# -- adaptive tests ----------------------------------------------------------------------------------------------------


def test_posterior_is_prior_times_likelihood():
    items = known_items([0.0, 1.0, -1.0], [1.0, 2.0, 0.5], dispersion=0.5)
    test = AdaptiveTest(items, target_se=0.01, prior=(0.2, 1.2))
    for name, score in (("i0", 1), ("i1", 0), ("i2", 1)):
        test.record(name, score)
    theta = np.linspace(-8, 8, 20001)
    density = np.exp(-(((theta - 0.2) / 1.2) ** 2) / 2)
    density *= (sigmoid(theta) * (1 - sigmoid(2 * (theta - 1))) * sigmoid((theta + 1) / 2)) ** 2
    mean = (density * theta).sum() / density.sum()
    assert test.ability == pytest.approx(mean, abs=1e-3)
    assert test.standard_error == pytest.approx(
        np.sqrt((density * (theta - mean) ** 2).sum() / density.sum()), abs=1e-3
    )
    assert test.expected_score == pytest.approx(2 / 3)


def as_exact_as_a_fine_grid(items, scores, every):
    """Records scores in the items' order, beside a sum over 200,001 abilities."""
    test = AdaptiveTest(items, target_se=0.001, prior=(0.0, 3.0))
    theta = np.linspace(-18, 18, 200_001)
    log_density = -((theta / 3) ** 2) / 2
    for j, (name, score) in enumerate(zip(items.names, scores, strict=True)):
        test.record(name, score)
        sign = 1 if score else -1
        log_density += np.log(sigmoid(sign * items.discrimination[j] * (theta - items.difficulty[j])))
        if j % every == 0:
            density = np.exp(log_density - log_density.max())
            density /= density.sum()
            mean = density @ theta
            assert test.ability == pytest.approx(mean, abs=1e-4)
            assert test.standard_error == pytest.approx(np.sqrt(density @ (theta - mean) ** 2), rel=1e-3)
    return test


@pytest.mark.parametrize("ability", [0.31, 7.2])  # the second is far out in the prior
def test_a_posterior_much_narrower_than_the_prior_is_as_exact(ability):
    random = np.random.default_rng(0)
    items = known_items(random.normal(ability, 1.0, 600), np.full(600, 2.0))
    scores = (random.random(600) < sigmoid(2 * (ability - items.difficulty))) * 1.0
    assert as_exact_as_a_fine_grid(items, scores, every=60).standard_error < 0.1


def test_answers_that_contradict_those_before_do_not_run_off_the_grid():
    items = known_items(np.repeat([2.0, -2.0], [100, 600]), np.repeat([4.0, 2.0], [100, 600]))
    scores = [float(at < 100 and at % 2) for at in range(700)]  # an ability of 2, then one below -2
    assert as_exact_as_a_fine_grid(items, scores, every=10).ability < -1


def test_the_posterior_of_graded_scores_is_that_of_dispersions_which_are_their_mean_over_it():
    covariance = np.array([[[0.5, 0.15], [0.15, 0.2]], [[1.0, 0.0], [0.0, 0.0]], np.zeros((2, 2))])
    items = Items(tuple("abc"), tuple("abc"), np.array([1.0, -0.5, 0.0]), np.array([0.3, 0.0, 0.2]), covariance, 0.05)
    scores = {"a": 0.3, "b": 0.9, "c": 0.6}
    theta = np.linspace(-9, 9, 20_001)
    p, _, variance = items.answer(theta)
    each = 0.05 + 0.95 * variance / (p * (1 - p))
    x, dispersion = np.array([*scores.values()])[:, None], np.full((3, 1), 0.05)
    for _ in range(50):
        density = np.exp(((x * np.log(p) + (1 - x) * np.log1p(-p)) / dispersion).sum(0) - (theta / 1.5) ** 2 / 2)
        density /= density.sum()
        dispersion = (each @ density)[:, None]
    mean = density @ theta
    error = np.sqrt(density @ (theta - mean) ** 2)
    for order in ("abc", "bca", "cba"):
        test = AdaptiveTest(items, target_se=0.001)
        for name in order:
            test.record(name, scores[name])
        assert (test.ability, test.standard_error) == pytest.approx((mean, error), abs=1e-6)


def test_graded_scores_on_uncertain_items_have_honest_errors():
    random, ratios = np.random.default_rng(0), []
    names, guess, sd = tuple(map(str, range(25))), random.normal(0, 1.0, 25), 0.8
    covariance = np.tile(np.diag([sd**2, 0.0]), (25, 1, 1))
    items = Items(names, names, guess, np.zeros(25), covariance, dispersion=0.05)
    for ability in random.normal(0, 1.0, 80):
        test = AdaptiveTest(items, target_se=0.001, prior=(0.0, 1.0))
        p = sigmoid(ability - random.normal(guess, sd))
        for name, score in zip(names, random.beta(19 * p, 19 * (1 - p)), strict=True):
            test.record(name, score)
        ratios.append((test.ability - ability) / test.standard_error)
    assert np.sqrt(np.mean(np.square(ratios))) < 1.1


def test_the_most_informative_item_comes_first_and_anchors_before_it():
    items = known_items([-4.0, 0.1, 4.0, 0.0], [1.0, 1.0, 1.0, 2.0])
    assert AdaptiveTest(items).next(2) == ["i3", "i1"]
    test = AdaptiveTest(items, anchors=["i2", "i0"])
    assert test.next(3) == ["i2", "i0", "i3"]
    test.record("i2", 0)
    assert test.next() == ["i0"]
    for name in test.next(4):
        test.record(name, 1)
    assert test.done
    assert test.next() == []


def test_it_stops_at_the_target_or_at_the_most_items(twelve_fit):
    def right_half(names):
        return [float(twelve_fit.items.difficulty[twelve_fit.items.item(name)] < 0.5) for name in names]

    test = AdaptiveTest.for_fit(twelve_fit, target_se=0.4).run(right_half, batch=4)
    assert test.standard_error <= 0.4
    assert len(test.scores) < 100
    assert test.ability == pytest.approx(0.5, abs=0.8)
    assert len(AdaptiveTest.for_fit(twelve_fit, target_se=0.01, max_items=33).run(right_half, batch=4).scores) == 33


def test_a_quarter_of_the_rows_ranks_systems_as_all_do():
    from scipy.stats import kendalltau

    made = simulate(24, 800, seed=5)
    fit = fit_irt(made.responses.select(made.responses.systems[:12]))
    abilities, errors = [], []
    for i in range(12, 24):
        row = dict(zip(made.responses.items, made.responses.scores[i], strict=True))
        test = AdaptiveTest.for_fit(fit, target_se=0.15, max_items=200)
        test.run(lambda names, row=row: [row[name] for name in names], batch=10)
        abilities.append(test.ability)
        errors.append(test.standard_error)
    assert kendalltau(abilities, made.responses.scores[12:].mean(1)).statistic >= 0.85
    assert covered(np.array(abilities), made.abilities[12:], np.array(errors)) >= 0.75


def test_adaptive_test_refuses_what_is_not_allowed(twelve_fit):
    items = twelve_fit.items
    with pytest.raises(ConfigError, match="target_se=0"):
        AdaptiveTest(items, target_se=0)
    with pytest.raises(ConfigError, match="max_items=1"):
        AdaptiveTest(items, max_items=1, anchors=["item-1", "item-2"])
    with pytest.raises(ConfigError, match="prior="):
        AdaptiveTest(items, prior=(0, 0))
    with pytest.raises(DataError, match="no item 'item-x'"):
        AdaptiveTest(items, anchors=["item-x"])
    test = AdaptiveTest(items)
    test.record("item-1", 1)
    with pytest.raises(DataError, match="'item-1' has the score 1 already"):
        test.record("item-1", 0)
    with pytest.raises(DataError, match="allowed is 0 to 1"):
        test.record("item-2", 1.5)
    with pytest.raises(DataError, match="allowed is 0 to 1"):
        test.record("item-2", NAN)
    with pytest.raises(ConfigError, match="count=0"):
        test.next(0)


# -- what goes in ------------------------------------------------------------------------------------------------------


class Answers(dspy.Module):
    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, question):
        return dspy.Prediction(answer=self.known[question])


def test_results_of_evaluate_go_in_as_they_are():
    rows = [dspy.Example(question=f"q{i}", answer=str(i)).with_inputs("question") for i in range(6)]
    right = {f"q{i}": str(i) for i in range(6)}
    half = right | {f"q{i}": "?" for i in range(3)}

    def exact(example, prediction, trace=None):
        return example.answer == prediction.answer

    def feedback(example, prediction, trace=None):
        return dspy.Prediction(score=0.5, feedback="so so")

    results = {
        "all": dspy.Evaluate(devset=rows, metric=exact)(Answers(right)),
        "half": dspy.Evaluate(devset=rows[::-1], metric=exact)(Answers(half)),
        "some": dspy.Evaluate(devset=rows[:2], metric=feedback)(Answers(right)),
    }
    found = Responses.from_evaluations(results)
    assert found.systems == ("all", "half", "some")
    expected = [[1] * 6, [0, 0, 0, 1, 1, 1], [0.5, 0.5, NAN, NAN, NAN, NAN]]
    assert found.scores == pytest.approx(np.array(expected), nan_ok=True)
    assert found.titles[0] == "q0 | 0"
    assert found.graded
    by_field = Responses.from_evaluations(results, item_field="question")
    assert by_field.items == ("q0", "q1", "q2", "q3", "q4", "q5")
    with pytest.raises(DataError, match=r"no field 'qestion'.*'question'"):
        Responses.from_evaluations(results, item_field="qestion")
    assert found.select(["some"]).items == found.items[:2]


def evaluation(*scores, question="q"):
    rows = [(dspy.Example(question=question), dspy.Prediction(), score) for score in scores]
    return dspy.evaluate.EvaluationResult(0.0, rows)


def test_equal_examples_of_one_devset_stay_apart():
    found = Responses.from_evaluations({"a": evaluation(1, 0), "b": evaluation(True, None, 0.25)})
    first = found.items[0]
    assert found.items == (first, f"{first}#2", f"{first}#3")
    assert found.scores == pytest.approx(np.array([[1, 0, NAN], [1, NAN, 0.25]]), nan_ok=True)


def test_an_id_made_for_an_equal_example_is_nobody_elses():
    rows = [(dspy.Example(id=name), dspy.Prediction(), 1) for name in ("a", "a", "a#2")]
    for results in ([rows], [rows[:2], rows[2:]]):
        given = {str(n): dspy.evaluate.EvaluationResult(0.0, each) for n, each in enumerate(results)}
        with pytest.raises(DataError, match=r"'a#2' is that of an example.*own value of 'id'"):
            Responses.from_evaluations(given, item_field="id")


def test_content_that_makes_no_id_or_no_utf_8(tmp_path):
    with pytest.raises(DataError, match=r"makes no id.*item_field"):
        Responses.from_evaluations({"a": evaluation(1, question={1: 2, "b": 3})})
    half = Responses.from_evaluations({name: evaluation(1, 0, question="\ud800") for name in "ab"})
    fit = fit_irt(half)
    fit.save(tmp_path / "fit.json")
    assert IRTFit.load(tmp_path / "fit.json").items.titles == half.titles == ("\ud800",) * 2


def test_scores_that_are_none_or_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"system 'a' has the score 3 on item .*; allowed is 0 to 1"):
        Responses.from_evaluations({"a": evaluation(3)})
    with pytest.raises(DataError, match="has the score 'good'"):
        Responses.from_evaluations({"a": evaluation("good")})
    with pytest.raises(DataError, match=r"shape \(0, 0\)"):
        Responses.from_evaluations({})


@pytest.mark.parametrize(
    "scores, systems, message",
    [
        ([[1, 0], [1]], None, "not a matrix of numbers"),
        ([1, 0], None, r"shape \(2,\)"),
        ([[1, 0]], ("a", "b"), "1, 2.* for 2 systems"),
        ([[1, 0], [0, 1]], ("a", "a"), "system 'a' is named more than once"),
        ([[1, 2], [0, 1]], None, "has the score 2 on item 'item-1'"),
        ([[None, None], [0, 1]], None, "system 'system-0' has no score"),
        ([[None, 1], [None, 1]], None, "item 'item-0' has no score"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_refused(scores, systems, message):
    with pytest.raises(DataError, match=message):
        Responses.from_matrix(scores, systems)


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_saved_as_json_and_read_again(twelve_fit, tmp_path):
    file = tmp_path / "fit.json"
    twelve_fit.save(file)
    json.loads(file.read_text())
    again = IRTFit.load(file)
    assert again.systems == twelve_fit.systems
    assert again.model == "2pl"
    assert (again.abilities == twelve_fit.abilities).all()
    assert (again.covariance == twelve_fit.covariance).all()
    assert (again.items.covariance == twelve_fit.items.covariance).all()
    assert again.items.names == twelve_fit.items.names
    assert again.telling_items() == twelve_fit.telling_items()
    assert again.warnings == ()


@pytest.mark.parametrize("change", [{"format": "other"}, {"abilities": [1.0]}, {"extra": 1}, {"items": {}}])
def test_another_file_is_refused(twelve_fit, tmp_path, change):
    file = tmp_path / "fit.json"
    twelve_fit.save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=r"fit\.json is not a fit that IRTFit\.save wrote"):
        IRTFit.load(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="Fit and save it again"):
        IRTFit.load(file)


def test_import_is_light():
    code = "import sys, dspy_lora.evaluation; print([m for m in ('scipy', 'sklearn', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
