from __future__ import annotations

import numpy as np
import pytest

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.tiers import (
    ColumnTiers,
    FittedTiers,
    OwnRecordTiers,
    PublicTiers,
    VolumeTiers,
)

ROWS = [{"tier": "strict", "text": "a"}, {"tier": "strict", "text": "b"}]


def rows():
    return ROWS


def unread():
    raise AssertionError("a rule on public facts reads no example")


def test_public_rules_look_at_no_example():
    assert PublicTiers({"ann": "strict"}).tier_of("ann", unread) == "strict"
    assert (
        PublicTiers(lambda user: "strict" if user < 18 else "usual").tier_of(12, unread) == "strict"
    )
    assert PublicTiers({}).basis == "public"
    with pytest.raises(ConfigurationError, match="every user has a tier"):
        PublicTiers({"ann": "strict"}).tier_of("bo", unread)


def test_a_declared_column_is_the_same_in_all_rows():
    assert ColumnTiers("tier").tier_of("ann", rows) == "strict"
    assert ColumnTiers("tier").basis == "public"
    for column in ("text", "nothing"):
        with pytest.raises(ConfigurationError, match="holds one tier for each user"):
            ColumnTiers(column).tier_of("ann", rows)


def test_a_rule_on_the_own_record_is_marked():
    rule = OwnRecordTiers(lambda examples: "strict" if len(examples) > 1 else "usual")
    assert rule.tier_of("ann", rows) == "strict"
    assert rule.basis == "own_record"


def test_volume_is_a_rule_on_the_own_record():
    rule = VolumeTiers({"light": 2, "heavy": 10})
    tiers = [rule.tier_of("ann", lambda count=count: [0] * count) for count in (1, 2, 3, 10, 99)]
    assert tiers == ["light", "light", "heavy", "heavy", "heavy"]
    assert rule.basis == "own_record"
    for limits in ({"one": 1}, {"a": 3, "b": 3}, {"a": 3, "b": 1}):
        with pytest.raises(ConfigurationError, match="at least two tiers with rising numbers"):
            VolumeTiers(limits)


def volumes(user, examples):
    return [float(user)]


def test_clusters_of_public_people_are_named_by_their_centres():
    pytest.importorskip("sklearn")
    public = np.concatenate([np.full((20, 1), 1.0), np.full((20, 1), 50.0)])
    tiers = FittedTiers.clusters(
        public, names=["usual", "strict"], features=volumes, basis="public", fitted_on="public"
    )
    assert [tiers.tier_of(user, unread) for user in (0, 3, 60)] == ["usual", "usual", "strict"]
    assert tiers.basis == "public"


def test_an_isolation_forest_on_public_people_finds_the_unusual():
    pytest.importorskip("sklearn")
    public = np.random.default_rng(0).normal(size=(200, 1))
    tiers = FittedTiers.outliers(
        public,
        usual="usual",
        unusual="strict",
        features=lambda user, examples: [float(len(examples()))],
        basis="own_record",
        fitted_on="public",
    )
    assert tiers.tier_of("ann", lambda: [0] * 40) == "strict"
    assert tiers.tier_of("ann", list) == "usual"
    assert tiers.basis == "own_record"


@pytest.mark.parametrize("made", ["clusters", "outliers", "model"])
def test_models_of_protected_users_are_refused_with_the_reason(made):
    options = {"features": volumes, "basis": "own_record", "fitted_on": "training users"}
    with pytest.raises(UnsupportedOperationError, match="fitted on public data") as caught:
        if made == "clusters":
            FittedTiers.clusters([[0.0]], names=["a", "b"], **options)
        elif made == "outliers":
            FittedTiers.outliers([[0.0]], usual="a", unusual="b", **options)
        else:
            FittedTiers(object(), names={0: "a"}, **options)
    assert "not even the largest ε would hold" in caught.value.cost


def test_a_fitted_model_says_what_it_looks_at():
    with pytest.raises(ConfigurationError, match="`basis` must be one of"):
        FittedTiers(object(), names={}, features=volumes, basis="both", fitted_on="public")
