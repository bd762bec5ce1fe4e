import numpy as np
import pytest
from dspy_lora.optimizers.choosing import choose, interval, max_gain


def test_noise_returns_the_simplest_program_at_its_level():
    rng = np.random.default_rng(0)
    kept = sum(choose(rng.random((12, 60)) < 0.5, range(12)).index == 0 for _ in range(100))
    assert kept >= 90  # alpha = 0.05


def test_a_real_gain_is_returned_and_a_simpler_equal_preferred():
    rng = np.random.default_rng(1)
    hard = rng.random(100)
    scores = [hard < 0.4, hard < 0.8, hard < 0.81]
    assert choose(scores, [0, 1, 2]).index == 1
    assert choose(scores, [0, 2, 1]).index == 2
    assert choose([hard < 0.4, hard < 0.6, hard < 0.95], [0, 1, 2]).index == 2


def test_copies_of_one_program_gain_nothing():
    scores = np.tile(np.arange(20) % 2, (5, 1))
    choice = choose(scores, [0, 1, 1, 1, 2])
    assert choice.index == 0
    assert choice.gain == 1.0


def test_the_p_value_of_one_difference_is_exact_for_few_rows():
    assert max_gain([[1.0] * 5]) == pytest.approx(1 / 2**5, abs=0.01)


def test_an_interval_holds_the_mean_and_narrows():
    wide, narrow = interval([0, 1] * 5), interval([0, 1] * 500)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize("scores", [[], [[]], [1.0, 0.0]])
def test_no_table_is_refused(scores):
    with pytest.raises(ValueError, match="at least one program"):
        choose(scores, [0])
