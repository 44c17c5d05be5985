from __future__ import annotations

import math

import pytest

from lightning_privacy.accounting import accountants, delta, epsilon
from lightning_privacy.errors import ConfigurationError
from tests.accounting.goldens import exact_delta, exact_epsilon, golden, release

BRACKETS = golden("poisson_gaussian")["rows"]
PUBLISHED = golden("published")


@pytest.mark.parametrize(("q", "sigma", "steps", "d", "lower", "upper", "rdp"), BRACKETS)
def test_pld_lies_in_the_golden_bracket(q, sigma, steps, d, lower, upper, rdp):
    # The bracket's grid was up to ten times finer: 2e-4 is what the coarser one may add.
    assert lower <= epsilon([release(sigma, q, steps)], d) <= upper + 2e-4


@pytest.mark.parametrize(("q", "sigma", "steps", "d", "lower", "upper", "rdp"), BRACKETS)
def test_a_coarse_grid_is_still_an_upper_bound(q, sigma, steps, d, lower, upper, rdp):
    fine = epsilon([release(sigma, q, steps)], d)
    assert fine <= epsilon([release(sigma, q, steps)], d, discretization=1e-3) + 1e-9
    assert fine <= epsilon([release(sigma, q, steps)], d, discretization=1e-2) + 1e-9


@pytest.mark.parametrize(("q", "sigma", "steps", "d", "lower", "upper", "rdp"), BRACKETS)
def test_rdp_is_the_known_value_and_above_the_bracket(q, sigma, steps, d, lower, upper, rdp):
    value = epsilon([release(sigma, q, steps)], d, "rdp")
    assert value == pytest.approx(rdp, rel=1e-6)
    assert value >= lower


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "d", "lower", "upper", "rdp"),
    [row for row in BRACKETS if row[2] <= 4000],
)
def test_prv_is_within_a_hundredth_of_pld(q, sigma, steps, d, lower, upper, rdp):
    pld = epsilon([release(sigma, q, steps)], d)
    assert lower <= epsilon([release(sigma, q, steps)], d, "prv") <= pld + 0.011


@pytest.mark.parametrize(
    ("accountant", "q", "sigma", "steps", "d", "value", "tolerance", "where"),
    PUBLISHED["epsilon"]["rows"],
)
def test_published_epsilons(accountant, q, sigma, steps, d, value, tolerance, where):
    assert epsilon([release(sigma, q, steps)], d, accountant) == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "value", "tolerance"), PUBLISHED["delta_at_epsilon_1"]["rows"]
)
def test_published_deltas(q, sigma, steps, value, tolerance):
    assert delta([release(sigma, q, steps)], 1.0) == pytest.approx(value, abs=tolerance)
    assert delta([release(sigma, q, steps)], 1.0, "rdp") >= value - tolerance


@pytest.mark.parametrize(("parts", "d", "value", "tolerance"), PUBLISHED["heterogeneous"]["rows"])
def test_different_releases_compose(parts, d, value, tolerance):
    releases = [release(*part) for part in parts]
    pld = epsilon(releases, d)
    assert pld == pytest.approx(value, abs=tolerance)
    assert pld == epsilon(releases[::-1], d)
    assert pld <= epsilon(releases, d, "prv") <= pld + 0.011
    assert pld <= epsilon(releases, d, "rdp")


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("d", [1e-2, 1e-5, 1e-9, 1e-12])
def test_the_gaussian_mechanism_is_exact_and_never_below(mu, d):
    releases = [release(10 / mu, 1.0, 100)]
    truth = exact_epsilon(mu, d)
    assert truth <= epsilon(releases, d) <= truth * (1 + 1e-5) + 1e-6
    assert d <= delta(releases, truth) * (1 + 1e-9)
    assert delta(releases, truth) == pytest.approx(exact_delta(mu, truth), rel=1e-3)
    assert epsilon(releases, d, "rdp") >= truth


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_nothing_released_costs_nothing(accountant):
    assert epsilon([], 1e-5, accountant) == 0
    assert epsilon([release(1.0, 0.1, 0)], 1e-5, accountant) == 0


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_no_noise_costs_everything(accountant):
    assert epsilon([release(1.0, 0.1, 5), release(0.0, 0.1)], 1e-5, accountant) == math.inf


def test_delta_of_nothing_and_of_no_noise():
    assert delta([], 1.0) == 0
    assert delta([release(0.0, 0.1)], 1.0) == 1


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_epsilon_is_never_negative(accountant):
    assert epsilon([release(2.0, 0.01)], 0.5, accountant) == 0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_monotone(accountant):
    def value(sigma=1.0, q=0.02, steps=300, d=1e-5):
        return epsilon([release(sigma, q, steps)], d, accountant)

    assert value(sigma=0.9) > value() > value(sigma=1.1)
    assert value(q=0.03) > value() > value(q=0.01)
    assert value(steps=301) > value() > value(steps=299)
    assert value(d=1e-6) > value() > value(d=1e-4)


def test_epsilon_and_delta_are_inverse():
    releases = [release(0.8, 0.02, 300)]
    for d in (1e-3, 1e-6, 1e-11):
        assert delta(releases, epsilon(releases, d)) == pytest.approx(d, rel=1e-3)


def test_a_unit_removed_and_a_unit_added_are_both_covered():
    # With a large rate and one step, the two directions differ visibly.
    from dp_accounting.pld import privacy_loss_distribution

    losses = privacy_loss_distribution.from_gaussian_mechanism(0.7, sampling_prob=0.5)
    worst = losses.get_delta_for_epsilon(0.3)
    assert delta([release(0.7, 0.5)], 0.3) == pytest.approx(worst, rel=1e-4)


def test_splitting_a_count_changes_nothing():
    whole = epsilon([release(1.0, 0.01, 100)], 1e-5)
    assert epsilon([release(1.0, 0.01, 60), release(1.0, 0.01, 40)], 1e-5) == whole


@pytest.mark.parametrize(
    "releases",
    [
        [release(1.0, 1.0, 3)],
        [release(0.35, 0.3, 1)],
        [release(20.0, 0.001, 10)],
        [release(1.0, 0.5, 1), release(1.0, 1.0, 1)],
    ],
)
def test_prv_corner_cases_stay_upper_bounds(releases):
    pld = epsilon(releases, 1e-5)
    assert pld - 1e-4 <= epsilon(releases, 1e-5, "prv") <= pld + 0.011


def test_prv_gives_the_rdp_bound_where_its_grid_explodes():
    releases = [release(0.2, 0.5, 1000)]
    with pytest.warns(RuntimeWarning, match="RDP bound"):
        value = epsilon(releases, 1e-5, "prv")
    assert value == epsilon(releases, 1e-5, "rdp")


def test_prv_gives_the_rdp_bound_where_opacus_fails(monkeypatch):
    import opacus.accountants

    def fail(*args, **kwargs):
        raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    monkeypatch.setattr(opacus.accountants.PRVAccountant, "get_epsilon", fail)
    releases = [release(1.23, 0.0123, 45)]
    with pytest.warns(RuntimeWarning, match="Discrete mean"):
        value = epsilon(releases, 1e-5, "prv")
    assert value == epsilon(releases, 1e-5, "rdp")


@pytest.mark.parametrize("bad", [0, 1, -1e-5, 2, math.nan, math.inf, True, "1e-5", None])
def test_delta_must_be_between_zero_and_one(bad):
    with pytest.raises(ConfigurationError, match=r"`delta` must be a finite number in \(0, 1\)"):
        epsilon([release(1.0, 0.1)], bad)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, True, "1"])
def test_epsilon_must_be_finite_and_not_negative(bad):
    with pytest.raises(ConfigurationError, match="`epsilon` must be a finite number in"):
        delta([release(1.0, 0.1)], bad)


@pytest.mark.parametrize("bad", [0, -1e-4, math.nan, True])
def test_the_grid_must_be_positive(bad):
    with pytest.raises(ConfigurationError, match="`discretization`"):
        epsilon([release(1.0, 0.1)], 1e-5, discretization=bad)


@pytest.mark.parametrize("bad", ["PLD", "moments", None, 3])
def test_the_accountant_must_be_offered(bad):
    with pytest.raises(ConfigurationError, match="one of 'pld', 'prv', 'rdp'"):
        epsilon([release(1.0, 0.1)], 1e-5, bad)


def test_the_gdp_accountant_is_refused_with_the_reason():
    with pytest.raises(ConfigurationError, match=r"gives 2\.23 where the truth is 3\.77"):
        epsilon([release(1.0, 0.1)], 1e-5, "gdp")


def test_prv_answers_for_epsilon_only():
    with pytest.raises(ConfigurationError, match="'pld' or 'rdp' when δ is asked for"):
        delta([release(1.0, 0.1)], 1.0, "prv")


def test_rdp_is_never_asked_about_replace_one(monkeypatch):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    relations = []
    original = RdpAccountant.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        relations.append(self._neighboring_relation)

    monkeypatch.setattr(RdpAccountant, "__init__", watched)
    epsilon([release(1.77, 0.177, 7)], 1e-5, "rdp")
    assert relations == [dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE]


def test_rdp_says_nothing_about_orders_that_it_leaves_out(capfd, caplog):
    import logging

    filters = list(logging.getLogger("absl").filters)
    assert epsilon([release(1.518648, 0.180484, 10)], 1e-5, "rdp") > 0
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger("absl").filters == filters


def test_repeated_questions_are_answered_from_memory(monkeypatch):
    releases = [release(1.31, 0.0131, 77)]
    first = epsilon(releases, 1e-5)
    monkeypatch.setattr(accountants, "pld_epsilon", None)
    assert epsilon(releases, 1e-5) == first
