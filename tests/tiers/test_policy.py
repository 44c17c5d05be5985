from __future__ import annotations

import math

import pytest

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.tiers import (
    PublicTiers,
    SensitivityPolicy,
    TierMeasures,
    TierPolicy,
    measured_texts,
)

FIELDS = {
    "segmentation": PublicTiers({}),
    "targets": {"a": 1.0, "b": 8.0},
    "shares": {"a": 0.5, "b": 0.5},
}


def measures(value: float, source: str = "declared") -> TierMeasures:
    return TierMeasures(volume=value, kinds=value, correlation=value, exposure=value, source=source)


# ---------------------------------------------------------------------- assessment
def test_scores_become_budgets_between_the_two_ends():
    policy = SensitivityPolicy(strictest=1.0, loosest=9.0)
    targets = policy.targets({"low": measures(0.0), "middle": measures(0.5), "high": measures(1.0)})
    assert targets == pytest.approx({"low": 9.0, "middle": 3.0, "high": 1.0})


def test_each_aspect_counts_by_its_weight():
    only = SensitivityPolicy(
        strictest=1.0, loosest=8.0, volume=0, kinds=3, correlation=0, exposure=1
    )
    known = TierMeasures(volume=1, kinds=1, correlation=1, exposure=0, source="public")
    assert only.score(known) == pytest.approx(0.75)


@pytest.mark.parametrize("source", ["protected", "training data", ""])
def test_measurements_of_protected_users_are_refused(source):
    with pytest.raises(UnsupportedOperationError, match="public or declared data"):
        measures(0.5, source)


@pytest.mark.parametrize(
    "changes",
    [{"strictest": 9.0}, {"volume": -1}, {"loosest": math.inf},
     {"volume": 0, "kinds": 0, "correlation": 0, "exposure": 0}],
)  # fmt: skip
def test_policies_have_ranges(changes):
    with pytest.raises(ConfigurationError):
        SensitivityPolicy(**{"strictest": 1.0, "loosest": 8.0, **changes})


def test_texts_of_public_people_are_measured():
    plain = measured_texts([["the sun is warm", "rain falls"], ["good day"]], exposure=0.1)
    telling = measured_texts(
        [["my password is 123456"] * 30, ["my account 99887766 again"] * 30], exposure=0.9
    )
    assert plain.kinds == 0 < telling.kinds == 1
    assert plain.volume < telling.volume < 1
    assert plain.correlation < telling.correlation == 1
    with pytest.raises(ConfigurationError, match="there is a person with a text"):
        measured_texts([[]], exposure=0)
    with pytest.raises(UnsupportedOperationError):
        measured_texts([["a"]], exposure=0, source="protected")


# ---------------------------------------------------------------------- policies
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {"a": 1.0}, "shares": {"a": 1.0}}, "at least two"),
        ({"shares": {"a": 0.5, "c": 0.5}}, "name the same tiers"),
        ({"shares": {"a": 0.5, "b": 0.6}}, "`shares` add up to 1"),
        ({"shares": {"a": 0.0, "b": 1.0}}, r"`shares\['a'\]` must be"),
        ({"targets": {"a": 0.0, "b": 8.0}}, r"`targets\['a'\]` must be"),
        ({"method": "louder"}, "`method` must be one of 'scale', 'sample'"),
    ],
)
def test_policies_that_promise_nothing_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        TierPolicy(**{**FIELDS, **changes})


@pytest.mark.parametrize("method", ["noise", "variance", "per_user_noise"])
def test_noise_that_depends_on_who_is_present_is_refused_with_the_reason(method):
    with pytest.raises(UnsupportedOperationError, match="does not depend on who is present") as e:
        TierPolicy(**{**FIELDS, "method": method})
    assert "its variance tells who was there" in e.value.cost


def test_the_headline_is_the_largest_target():
    assert TierPolicy(**FIELDS).largest_target == 8.0
