"""Fits with individual budgets: measured bounds, ε by tier, what is published, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_privacy import ConfigurationError, GuaranteeError
from lightning_privacy.reports.tables import summary_rows
from lightning_privacy.tiers import OwnRecordTiers, PublicTiers, TierPolicy
from tests.callbacks.test_users import IDS, LIGHTNING_NOISE, Owned, Poisoned, loader
from tests.callbacks.training import Regression, privacy, same, trainer, weights

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
TARGETS = {"strict": 1.0, "usual": 4.0}
SHARES = {"strict": 0.25, "usual": 0.75}
STEPS: dict[str, Any] = {"max_steps": 6, "max_epochs": -1}


def of_public(user: str) -> str:
    return "strict" if user in {"user 0", "user 3", "ann"} else "usual"


def policy(method: str = "scale", **changes: Any) -> TierPolicy:
    fields = {
        "segmentation": PublicTiers(of_public),
        "targets": TARGETS,
        "shares": SHARES,
        "method": method,
    }
    return TierPolicy(**{**fields, **changes})


def tiered(tiers: TierPolicy, **settings: Any) -> Any:
    return privacy(
        **{
            "epsilon": None,
            "unit": "user",
            "group_size": 3,
            "expected_batch_size": 4,
            "noise_multiplier": None,
            "tiers": tiers,
            **settings,
        }
    )


@pytest.mark.parametrize("method", ["scale", "sample"])
def test_each_tier_keeps_its_own_budget_and_the_largest_is_the_headline(
    tmp_path: Path, method: str
) -> None:
    callback = tiered(policy(method), test_seed=None, journal=False)
    trainer(tmp_path, callback, **STEPS).fit(Regression(), loader())
    by_tier = callback.plan.epsilon_by_tier()
    assert {name: value <= TARGETS[name] for name, value in by_tier.items()} == {
        "strict": True,
        "usual": True,
    }
    assert by_tier["strict"] > 0.95
    assert callback.epsilon() == pytest.approx(by_tier["usual"], rel=1e-6)
    rows = dict(summary_rows(callback.summary()))
    assert float(rows["epsilon of tier strict"]) <= 1.0
    assert float(rows["epsilon spent"]) <= 4.0


def test_a_tier_that_depends_on_the_record_is_private(tmp_path: Path) -> None:
    own = OwnRecordTiers(lambda examples: "strict" if len(examples) > 4 else "usual")
    callback = tiered(policy(segmentation=own), test_seed=None, journal=False)
    trainer(tmp_path, callback, **STEPS).fit(Regression(), loader())
    assert callback.plan.epsilon_by_tier() == {}
    rows = dict(summary_rows(callback.summary()))
    assert "only the epsilon above holds for all" in rows["tiers"]
    assert not any("strict" in label for label in rows)
    assert callback.epsilon() <= 4.0


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize(("user", "tier"), [("ann", "strict"), ("bo", "usual")])
def test_a_users_bound_is_that_of_the_tier(
    tmp_path: Path, user: str, tier: str, count: int
) -> None:
    others = [f"other {number}" for number in range(5) for _ in range(2)]
    moved, bounds = [], {}
    # Both runs have the same noise, which the difference does not.
    for ids in ([*others, *[user] * count], others):
        module = Regression(lr=1.0)
        callback = tiered(
            policy(), sample_rate=1.0, expected_batch_size=1, group_size=40,
            independence_check=False,
        )  # fmt: skip
        fit = trainer(tmp_path, callback, max_steps=1, max_epochs=-1)
        fit.fit(module, DataLoader(Poisoned(ids, user, 1000.0), batch_size=3))
        moved.append(weights(module))
        bounds = {t.name: t.clip_share * callback.plan.clip_norm for t in callback.plan.tiers}
    distance = sum(float((moved[0][n] - v).square().sum()) for n, v in moved[1].items()) ** 0.5
    assert bounds["strict"] < 0.6 * bounds["usual"]
    assert 0.98 * bounds[tier] < distance <= bounds[tier] * (1 + 1e-4)
    assert sum(SHARES[name] * bound for name, bound in bounds.items()) == pytest.approx(1.0)


def test_a_resume_keeps_the_tiers(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole, again = Regression(), Regression()
    options: dict[str, Any] = {"batch_size": 50}
    trainer(tmp_path, tiered(policy()), saving, **STEPS).fit(whole, loader(**options))
    path = str(tmp_path / "step=3.ckpt")
    trainer(tmp_path, tiered(policy()), **STEPS).fit(again, loader(**options), ckpt_path=path)
    assert same(weights(again), weights(whole))
    other = policy(targets={"strict": 0.5, "usual": 4.0})
    for wrong in (other, policy("sample"), None):
        settings = {} if wrong is not None else {"epsilon": 4.0}
        with pytest.raises(GuaranteeError, match="goes on with the mechanism"):
            trainer(tmp_path, tiered(wrong, **settings), **STEPS).fit(
                Regression(), loader(**options), ckpt_path=path
            )


def test_a_user_without_a_budget_is_refused(tmp_path: Path) -> None:
    nameless = policy(segmentation=PublicTiers(lambda user: "new"))
    with pytest.raises(ConfigurationError, match="every user's tier has a target"):
        trainer(tmp_path, tiered(nameless), **STEPS).fit(Regression(), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 3.0}, "ε is the largest one"),
        ({"noise_multiplier": 1.0}, "ε is the largest one"),
        ({"user_sampling": "examples"}, "tiers go with user_sampling='users'"),
        ({"accountant": "rdp"}, "tiers go with user_sampling='users'"),
        ({"unit": "example", "group_size": None}, "go with unit='user'"),
    ],
)
def test_tiers_go_with_drawn_users_and_their_own_noise(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiered(policy(), **settings)


def test_the_number_of_users_is_that_of_the_index() -> None:
    assert len(Owned()) == len(IDS)
