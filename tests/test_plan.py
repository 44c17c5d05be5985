from __future__ import annotations

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_privacy.accounting import GaussianRelease, epsilon
from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.plan import PrivacyPlan, precision_slack_for
from lightning_privacy.types import NeighbouringRelation, PrivacyUnit

FIELDS = {
    "relation": NeighbouringRelation.ADD_OR_REMOVE,
    "sample_rate": 0.02,
    "expected_batch_size": 20,
    "noise_multiplier": 1.1,
    "clip_norm": 0.5,
    "steps": 300,
    "delta": 1e-5,
}


def plan(**changes) -> PrivacyPlan:
    return PrivacyPlan(**{**FIELDS, **changes})


def test_what_follows_from_the_fields():
    made = plan()
    assert made.unit is PrivacyUnit.EXAMPLE
    assert (made.clipping, made.accountant) == ("flat", "pld")
    assert made.noise_std == pytest.approx(0.55)
    assert made.sensitivity == 0.5
    assert made.effective_noise_multiplier == pytest.approx(1.1 / 1.0001)
    event = GaussianRelease(
        noise_multiplier=made.effective_noise_multiplier, sample_rate=0.02, count=300
    )
    assert made.release(300) == event
    assert made.epsilon() == epsilon([event], 1e-5)
    assert made.epsilon(10) == epsilon([event.times(10)], 1e-5) < made.epsilon()
    assert made.epsilon(0) == 0


def test_rounding_and_repeated_releases_cost_budget():
    assert plan(precision_slack=0.02).effective_noise_multiplier == pytest.approx(1.1 / 1.02)
    assert plan(precision_slack=0.02).epsilon() > plan().epsilon()
    twice = plan(releases_per_draw=4, precision_slack=0)
    assert twice.effective_noise_multiplier == pytest.approx(0.55)
    assert twice.noise_std == plan().noise_std


def test_every_accountant_can_be_asked():
    values = [plan(accountant=name).epsilon() for name in ("pld", "prv", "rdp")]
    assert values[0] <= values[1] <= values[0] + 0.011
    assert values[0] < values[2]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("budget", [1.0, 8.0])
def test_max_steps_is_exact(accountant, budget):
    made = plan(accountant=accountant)
    steps = made.max_steps(budget)
    assert made.epsilon(steps) <= budget < made.epsilon(steps + 1)


@pytest.mark.parametrize("changes", [{}, {"precision_slack": 0.02}, {"releases_per_draw": 3}])
@pytest.mark.parametrize("budget", [0.5, 3.0])
def test_a_calibrated_plan_keeps_its_budget_and_uses_it(changes, budget):
    fields = {name: value for name, value in FIELDS.items() if name != "noise_multiplier"}
    made = PrivacyPlan.calibrated(epsilon=budget, **fields, **changes)
    assert budget * (1 - 2e-3) < made.epsilon() <= budget
    assert made.max_steps(budget) >= made.steps
    assert {**made.to_dict(), "noise_multiplier": 1.1} == plan(**changes).to_dict()


def test_a_calibrated_plan_takes_every_field_of_a_plan():
    import inspect

    taken = set(inspect.signature(PrivacyPlan.calibrated).parameters)
    fields = {field.name for field in dataclasses.fields(PrivacyPlan)}
    assert taken == fields - {"noise_multiplier", "tiers", "tiers_published"} | {
        "epsilon",
        "progress",
    }


def test_a_known_seed_has_no_privacy():
    made = plan(deterministic=True)
    assert made.epsilon() == made.epsilon(1) == math.inf
    assert made.epsilon(0) == 0
    assert "infinite" in made.describe()["epsilon"]
    # The schedule is that of the run which it stands for.
    assert made.max_steps(2.0) == plan().max_steps(2.0)
    silent = plan(deterministic=True, noise_multiplier=0)
    assert silent.epsilon() == math.inf
    assert silent.max_steps(2.0) == silent.steps
    calibrated = {name: value for name, value in FIELDS.items() if name != "noise_multiplier"}
    made = PrivacyPlan.calibrated(epsilon=2.0, deterministic=True, **calibrated)
    assert (
        made.noise_multiplier == PrivacyPlan.calibrated(epsilon=2.0, **calibrated).noise_multiplier
    )


def test_a_plan_is_frozen():
    made = plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.noise_multiplier = 0.1
    with pytest.raises((AttributeError, TypeError)):
        made.extra = 1


def test_a_plan_survives_every_kind_of_storage(tmp_path):
    made = plan(
        unit="user",
        user_sampling="examples",
        group_size=np.int64(4),
        relation="zero_out",
        precision_slack=np.float32(0.25),
        steps=np.int64(9),
    )
    assert made.unit is PrivacyUnit.USER
    assert made.release(9).group_size == 4
    assert made.relation is NeighbouringRelation.ZERO_OUT
    assert PrivacyPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert pickle.loads(pickle.dumps(made)) == made
    torch.save(made.to_dict(), tmp_path / "plan.pt")
    loaded = torch.load(tmp_path / "plan.pt", weights_only=True)
    assert PrivacyPlan.from_dict(loaded) == made
    assert hash(made) == hash(PrivacyPlan.from_dict(loaded))


@pytest.mark.parametrize("change", [{"more": 1}, {"delta": None}])
def test_a_stored_plan_must_have_exactly_the_fields(change):
    stored = plan().to_dict()
    stored.pop("delta")
    with pytest.raises(ConfigurationError, match="exactly the fields of PrivacyPlan"):
        PrivacyPlan.from_dict({**stored, **change} if "more" in change else stored)


def test_describe_says_it_in_words():
    rows = plan().describe()
    assert rows == {
        "privacy unit": "example",
        "neighbours": "one unit added or removed",
        "epsilon": "1.801",  # 1.8006, rounded up
        "delta": "1e-05",
        "noise multiplier": "1.1000",
        "sample rate": "0.02",
        "expected batch size": "20",
        "private steps": "300",
        "clip norm": "0.5",
        "clipping": "flat",
        "accountant": "PLD",
        "precision slack": "0.0001",
    }
    other = plan(relation="zero_out", releases_per_draw=2, clipping="per_layer").describe()
    assert other["neighbours"] == "one unit zeroed out (the number of units is public)"
    assert other["releases per draw"] == "2"
    assert other["clipping"] == "per layer"


WRONG_NUMBERS = [True, math.nan, math.inf, -math.inf, -1, "1", None]
WRONG_COUNTS = [True, 0, -1, 1.0, math.nan, "1", None]


@pytest.mark.parametrize(
    ("name", "bad", "must"),
    [
        *[("sample_rate", bad, "`sample_rate` must be a finite number in (0, 1]")
          for bad in [*WRONG_NUMBERS, 0, 1.0000001]],
        *[("expected_batch_size", bad, "`expected_batch_size` must be a finite number in (0, inf)")
          for bad in [*WRONG_NUMBERS, 0]],
        *[("noise_multiplier", bad, "`noise_multiplier` must be a finite number in [0, inf)")
          for bad in WRONG_NUMBERS],
        ("noise_multiplier", 0, "`noise_multiplier` must be a finite number > 0"),
        *[("clip_norm", bad, "`clip_norm` must be a finite number in (0, inf)")
          for bad in [*WRONG_NUMBERS, 0]],
        *[("precision_slack", bad, "`precision_slack` must be a finite number in [0, 1)")
          for bad in [*WRONG_NUMBERS, 1]],
        *[("delta", bad, "`delta` must be a finite number in (0, 1)")
          for bad in [*WRONG_NUMBERS, 0, 1, 2]],
        *[("steps", bad, "`steps` must be a whole number >= 1") for bad in WRONG_COUNTS],
        *[("releases_per_draw", bad, "`releases_per_draw` must be a whole number >= 1")
          for bad in WRONG_COUNTS],
        *[("unit", bad, "`unit` must be one of 'example', 'user'")
          for bad in ["record", None, 1]],
        *[("relation", bad, "`relation` must be one of 'add_or_remove', 'zero_out'")
          for bad in ["replace_one", None, True]],
        *[("clipping", bad, "`clipping` must be one of 'flat', 'per_layer', 'automatic'")
          for bad in ["ghost", None, 1]],
        *[("accountant", bad, "`accountant` must be one of 'pld', 'prv', 'rdp'")
          for bad in ["gdp", "PLD", None]],
        *[("deterministic", bad, "`deterministic` must be True or False")
          for bad in [1, 0, None, "yes"]],
    ],
)  # fmt: skip
def test_every_wrong_argument_has_its_own_error(name, bad, must):
    with pytest.raises(ConfigurationError) as caught:
        plan(**{name: bad})
    error = caught.value
    assert error.must == must
    assert repr(bad) in error.found
    assert error.cost
    assert error.remedy


def test_no_noise_is_refused_with_the_way_out():
    with pytest.raises(ConfigurationError, match="only deterministic=True allows 0"):
        plan(noise_multiplier=0)


def test_nothing_can_be_left_out():
    for name in FIELDS:
        with pytest.raises(TypeError, match=name):
            PrivacyPlan(**{other: value for other, value in FIELDS.items() if other != name})
    with pytest.raises(TypeError):
        PrivacyPlan(*FIELDS.values())


@pytest.mark.parametrize(
    ("names", "slack"),
    [
        (["64", "64-true", "float64", "double", "torch.float64"], 1e-9),
        (["32", "32-true", "float32", "float", "torch.float32"], 1e-4),
        (["bf16", "bf16-true", "bf16-mixed", "bfloat16", "torch.bfloat16"], 2e-2),
    ],
)
def test_the_slack_of_a_precision(names, slack):
    assert [precision_slack_for(name) for name in names] == [slack] * len(names)


def test_the_slack_covers_what_was_measured():
    assert precision_slack_for("bf16") > 0.007
    assert precision_slack_for("32") > 1e-6


@pytest.mark.parametrize(
    "bad", ["16", "16-mixed", "16-true", "float16", "transformer-engine", "", None]
)
def test_a_precision_without_a_known_bound_is_refused(bad):
    with pytest.raises(UnsupportedOperationError, match=r"must be 64, 32 or bf16"):
        precision_slack_for(bad)


def test_a_plan_does_not_load_torch(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, lightning_privacy.plan as p; "
        f"p.PrivacyPlan(**{ {**FIELDS, 'relation': 'zero_out'}!r}).epsilon(); "
        "print([name for name in ('torch', 'lightning', 'dp_accounting', 'opacus') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_drawn_users_are_units_and_drawn_examples_are_parts_of_them():
    users = plan(unit="user", user_sampling="users", group_size=4)
    examples = plan(unit="user", user_sampling="examples", group_size=4)
    assert users.epsilon() == plan().epsilon() < examples.epsilon()
    assert (users.sensitivity, examples.sensitivity) == (0.5, 2.0)
    assert users.noise_std == examples.noise_std
    assert "at most 4" in users.describe()["drawn and clipped"]
    assert "drawn and clipped" not in plan().describe()
    steps = examples.max_steps(1.0)
    assert examples.epsilon(steps) <= 1.0 < examples.epsilon(steps + 1)


def test_a_plan_is_calibrated_for_users_whose_examples_are_drawn():
    fields = {name: value for name, value in FIELDS.items() if name != "noise_multiplier"}
    trials = []
    made = PrivacyPlan.calibrated(
        epsilon=2.0,
        unit="user",
        user_sampling="examples",
        group_size=6,
        progress=lambda *at: trials.append(at),
        **fields,
    )
    assert 1.99 < made.epsilon() <= 2.0
    assert made.noise_multiplier > PrivacyPlan.calibrated(epsilon=2.0, **fields).noise_multiplier
    assert trials


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "user"}, "`user_sampling` must be one of"),
        ({"unit": "user", "user_sampling": "users"}, "`group_size` must be a whole number"),
        ({"group_size": 2}, "go with unit='user'"),
        ({"user_sampling": "users"}, "go with unit='user'"),
        (
            {"unit": "user", "user_sampling": "examples", "group_size": 2, "accountant": "rdp"},
            "must be 'pld' where a unit has several parts",
        ),
    ],
)
def test_plans_for_users_that_say_nothing_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        plan(**changes)


def test_other_accountants_serve_drawn_users_and_single_examples():
    for changes in ({"user_sampling": "users", "group_size": 9}, {"group_size": 1}):
        made = plan(**{"unit": "user", "user_sampling": "examples", "accountant": "rdp", **changes})
        assert made.epsilon() == plan(accountant="rdp").epsilon()
