"""Fits whose unit is a user, against a loop over users; resumes; what moves when one user does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_privacy import ConfigurationError, GuaranteeError
from lightning_privacy.accounting import PrivacyLedger
from lightning_privacy.noise import secret_from_seed
from lightning_privacy.reports.tables import summary_rows
from lightning_privacy.sampling import BoundedSampler, UserIndex, UserSampler
from tests.callbacks.training import (
    FEATURES,
    LIGHTNING_NOISE,
    SEED,
    Regression,
    data,
    privacy,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
COUNTS = [1, 7, 3, 20, 2, 1, 5, 4]
IDS = [f"user {number}" for number, count in enumerate(COUNTS) for _ in range(count)]
GROUP, EXPECTED = 6, 4
LR = 0.1


class Owned(Dataset):
    """The regression data, with an owner for each row."""

    def __init__(self, ids: list[str] = IDS) -> None:
        self.users = tuple(ids)
        self._rows = data(600)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self._rows[index]


def loader(batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(Owned(), batch_size=batch_size, **options)


def user_privacy(**settings: Any) -> Any:
    return privacy(
        **{"unit": "user", "expected_batch_size": EXPECTED, "group_size": GROUP, **settings}
    )


def contributions(module: nn.Module, sampling: str, cursor: int) -> list[dict[str, Tensor]]:
    """The unclipped gradients of one draw: one for each user, or one for each example."""
    index, secret = UserIndex(IDS), secret_from_seed(SEED)
    if sampling == "users":
        draw = UserSampler(
            index=index, group_size=GROUP, sample_rate=EXPECTED / len(COUNTS), secret=secret
        ).draw(cursor)
    else:
        sampler = BoundedSampler(
            index=index,
            group_size=GROUP,
            sample_rate=EXPECTED / sum(min(GROUP, count) for count in COUNTS),
            secret=secret,
            seed=secret,
        )
        draw = [np.array([row]) for row in sampler.draw(cursor)]
    found = []
    for rows in draw:
        batch = [
            torch.stack(column) for column in zip(*(Owned()[row] for row in rows), strict=True)
        ]
        gradients = torch.autograd.grad(module.loss(batch), list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def by_hand(sampling: str, steps: int, clip_norm: float) -> dict[str, Tensor]:
    """Weights after noiseless private steps with plain SGD, one unit at a time."""
    module = Regression()
    for cursor in range(steps):
        total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        for gradients in contributions(module, sampling, cursor):
            norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
            factor = min(1.0, clip_norm / float(norm))
            total = {name: total[name] + factor * g for name, g in gradients.items()}
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.sub_(LR * total[name] / EXPECTED)
    return weights(module)


# ---------------------------------------------------------------------- the algorithms
@pytest.mark.parametrize("sampling", ["users", "examples"])
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (50, 0), (4, 2)])
def test_a_fit_is_the_algorithm_by_hand(
    tmp_path: Path, sampling: str, batch_size: int, workers: int
) -> None:
    module = Regression()
    callback = user_privacy(user_sampling=sampling, noise_multiplier=0.0, clip_norm=0.5)
    trainer(tmp_path, callback, max_steps=5, max_epochs=-1).fit(
        module, loader(batch_size, num_workers=workers)
    )
    for name, value in by_hand(sampling, 5, 0.5).items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert max(module.calls[-4:]) <= batch_size  # the checks before took rows of their own


def test_manual_optimization_sees_whole_users(tmp_path: Path) -> None:
    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module = Manual()
    callback = user_privacy(noise_multiplier=0.0, clip_norm=0.5)
    trainer(tmp_path, callback, max_steps=4, max_epochs=-1).fit(module, loader())
    for name, value in by_hand("users", 4, 0.5).items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_fit_that_clips_each_example_alone_is_told_apart(tmp_path: Path) -> None:
    """The comparison has power: the same draws, clipped by example, give other weights."""
    module, wrong = Regression(), Regression()
    callback = user_privacy(noise_multiplier=0.0, clip_norm=0.5)
    trainer(tmp_path, callback, max_steps=1, max_epochs=-1).fit(module, loader())
    index, secret = UserIndex(IDS), secret_from_seed(SEED)
    sampler = UserSampler(index=index, group_size=GROUP, sample_rate=0.5, secret=secret)
    with torch.no_grad():
        total = [torch.zeros_like(p) for p in wrong.parameters()]
    for rows in sampler.draw(0):
        for row in rows:
            batch = [part[None] for part in Owned()[row]]
            gradients = torch.autograd.grad(wrong.loss(batch), list(wrong.parameters()))
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            factor = min(1.0, 0.5 / float(norm))
            total = [part + factor * g for part, g in zip(total, gradients, strict=True)]
    moved = sum(float((LR * part / EXPECTED).square().sum()) for part in total) ** 0.5
    start = weights(Regression())
    right = sum(float((module.state_dict()[n] - v).square().sum()) for n, v in start.items()) ** 0.5
    assert right <= LR * 0.5 * len(COUNTS) / EXPECTED < moved


# ---------------------------------------------------------------------- one user more or less
class Poisoned(Owned):
    """One user's rows hold something else, or nothing finite."""

    def __init__(self, ids: list[str], user: str, factor: float) -> None:
        super().__init__(ids)
        self._user, self._factor = user, factor

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return (x * self._factor, y * self._factor) if self.users[index] == self._user else (x, y)


@pytest.mark.parametrize("count", [1, 7, 500])
@pytest.mark.parametrize("factor", [100.0, float("nan")])
@pytest.mark.parametrize(("sampling", "parts"), [("users", 1), ("examples", 3)])
def test_one_user_moves_the_weights_by_at_most_the_sensitivity(
    tmp_path: Path, count: int, factor: float, sampling: str, parts: int
) -> None:
    """Everybody is drawn (rate 1), so that the two runs differ in one user and nothing else."""
    others = [f"other {number}" for number in range(5) for _ in range(2)]

    def moved_to(ids: list[str]) -> dict[str, Tensor]:
        module = Regression(lr=1.0)
        callback = user_privacy(
            user_sampling=sampling,
            noise_multiplier=0.0,
            clip_norm=0.5,
            group_size=3,
            sample_rate=1.0,
            expected_batch_size=1,
            independence_check=False,
        )
        fit = trainer(tmp_path, callback, max_steps=1, max_epochs=-1)
        fit.fit(module, DataLoader(Poisoned(ids, "ann", factor), batch_size=2))
        assert callback.plan.sensitivity == parts * 0.5
        return weights(module)

    with_user, without = moved_to([*others, *["ann"] * count]), moved_to(others)
    distance = sum(float((with_user[n] - v).square().sum()) for n, v in without.items()) ** 0.5
    assert distance <= min(parts, count) * 0.5 * (1 + 1e-4)
    assert (distance > 0.49) == (factor == 100.0)


# ---------------------------------------------------------------------- plan, table, resume
def test_the_plan_counts_users_or_examples_and_says_so(tmp_path: Path) -> None:
    rates, shown = {}, {}
    for sampling in ("users", "examples"):
        callback = user_privacy(user_sampling=sampling, test_seed=None, journal=False)
        trainer(tmp_path, callback, max_steps=2, max_epochs=-1).fit(Regression(), loader())
        rates[sampling] = callback.plan.sample_rate
        assert callback.epsilon() == callback.plan.epsilon(2) > 0
        shown[sampling] = dict(summary_rows(callback.summary()))
        assert shown[sampling]["privacy unit"] == "user"
    assert rates == {"users": 4 / 8, "examples": 4 / sum(min(6, count) for count in COUNTS)}
    assert "the mean over at most 6" in shown["users"]["drawn and clipped"]
    assert "out of at most 6" in shown["examples"]["drawn and clipped"]
    assert any("share of examples clipped" in label for label in shown["examples"])


@pytest.mark.parametrize("sampling", ["users", "examples"])
def test_a_resumed_fit_equals_the_unbroken_one(tmp_path: Path, sampling: str) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options: dict[str, Any] = {"max_steps": 6, "max_epochs": -1}
    whole = Regression()
    trainer(tmp_path, user_privacy(user_sampling=sampling), saving, **options).fit(whole, loader())
    again = Regression()
    trainer(tmp_path, user_privacy(user_sampling=sampling), **options).fit(
        again, loader(), ckpt_path=str(tmp_path / "step=3.ckpt")
    )
    assert same(weights(again), weights(whole))


class Seen(pl.Callback):
    """Which rows took part."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        parts = trainer.train_dataloader.current
        self.rows |= {i for part in parts for i in part.indices if part.drawn}


def test_which_examples_of_a_user_take_part_is_fixed_over_real_resumes(tmp_path: Path) -> None:
    def fit(steps: int, *others: pl.Callback, **options: Any) -> set[int]:
        callback = user_privacy(
            user_sampling="examples", test_seed=None, group_size=2, sample_rate=0.8
        )
        seen = Seen()
        trainer(tmp_path, callback, seen, *others, max_steps=steps, max_epochs=-1).fit(
            Regression(), loader(), **options
        )
        return seen.rows

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    first = fit(12, saving)
    path = tmp_path / "step=12.ckpt"
    assert fit(24, ckpt_path=str(path)) == first
    assert len(first) == sum(min(2, count) for count in COUNTS)
    assert fit(12) != first
    stored = torch.load(path, weights_only=True)["callbacks"][
        "lightning_privacy.DifferentialPrivacy"
    ]
    assert len(bytes.fromhex(stored["bound_seed"])) == 32
    assert stored["plan"]["group_size"] == 2
    assert stored["ledger"]["releases"][0]["group_size"] == 2


@pytest.mark.parametrize(
    "change", [{"group_size": 3}, {"user_sampling": "examples"}, {"unit": "example"}]
)
def test_a_resume_keeps_the_way_users_are_drawn(tmp_path: Path, change: dict[str, Any]) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    options: dict[str, Any] = {"max_steps": 3, "max_epochs": -1}
    trainer(tmp_path, user_privacy(), saving, **options).fit(Regression(), loader())
    settings: dict[str, Any] = {**change}
    if change.get("unit") == "example":
        settings |= {"group_size": None}
    with pytest.raises(GuaranteeError, match="goes on with the mechanism that it began with"):
        trainer(tmp_path, user_privacy(**settings), max_steps=6, max_epochs=-1).fit(
            Regression(), loader(), ckpt_path=str(tmp_path / "step=3.ckpt")
        )


def test_users_of_the_data_module_and_users_of_nobody(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        users = IDS

        def train_dataloader(self) -> DataLoader:
            return DataLoader(data(len(IDS)), batch_size=4)

    options: dict[str, Any] = {"max_steps": 1, "max_epochs": -1}
    callback = user_privacy()
    trainer(tmp_path, callback, **options).fit(Regression(), Data())
    assert callback.plan.sample_rate == 0.5
    with pytest.raises(ConfigurationError, match="known to which user each example belongs"):
        trainer(tmp_path, user_privacy(), **options).fit(
            Regression(), DataLoader(data(len(IDS)), batch_size=4)
        )
    with pytest.raises(ConfigurationError, match="at least two users"):
        trainer(tmp_path, user_privacy(users=["one"] * FEATURES), **options).fit(
            Regression(), DataLoader(data(FEATURES), batch_size=4)
        )


def test_a_low_precision_fit_with_large_users(tmp_path: Path) -> None:
    callback = user_privacy(test_seed=None, journal=False)
    fit = trainer(tmp_path, callback, max_steps=3, max_epochs=-1, precision="bf16-mixed")
    fit.fit(Regression(), loader(2))
    assert callback.steps == 3
    assert callback.plan.precision_slack == 2e-2


# ---------------------------------------------------------------------- local steps
def local_steps(**settings: Any) -> Any:
    return user_privacy(
        **{"user_update": "local_steps", "local_learning_rate": 0.2, "clip_norm": 0.5, **settings}
    )


def test_local_steps_train_and_leave_the_weights_to_the_optimizer(tmp_path: Path) -> None:
    results = []
    for make in (local_steps, user_privacy):
        module = Regression()
        callback = make(noise_multiplier=0.0)
        trainer(tmp_path, callback, max_steps=4, max_epochs=-1).fit(module, loader(2))
        results.append(weights(module))
    start = weights(Regression())
    moved = sum(float((results[0][n] - v).square().sum()) for n, v in start.items()) ** 0.5
    assert 0 < moved <= 4 * LR * 0.5 * len(COUNTS) / EXPECTED
    assert not same(*results)


@pytest.mark.parametrize("count", [7, 500])
def test_one_user_with_local_steps_moves_the_weights_by_at_most_the_clip_norm(
    tmp_path: Path, count: int
) -> None:
    others = [f"other {number}" for number in range(5) for _ in range(2)]
    moved = []
    for ids in ([*others, *["ann"] * count], others):
        module = Regression(lr=1.0)
        callback = local_steps(
            noise_multiplier=0.0, group_size=60, sample_rate=1.0, expected_batch_size=1,
            independence_check=False,
        )  # fmt: skip
        fit = trainer(tmp_path, callback, max_steps=1, max_epochs=-1)
        fit.fit(module, DataLoader(Poisoned(ids, "ann", 3.0), batch_size=2))
        moved.append(weights(module))
    distance = sum(float((moved[0][n] - v).square().sum()) for n, v in moved[1].items()) ** 0.5
    assert 0.4 < distance <= 0.5 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_learning_rate": None}, "goes with local_learning_rate"),
        ({"user_update": None}, "goes with local_learning_rate"),
        ({"user_sampling": "examples"}, "and drawn users"),
        ({"local_learning_rate": 0.0}, "`local_learning_rate` must be"),
        ({"user_update": "best"}, "`user_update` must be one of"),
        ({"unit": "example", "group_size": None}, "go with unit='user'"),
    ],
)
def test_local_steps_need_a_rate_and_drawn_users(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        local_steps(**settings)


def test_a_ledger_adds_up_runs_of_one_unit_only(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.db", dataset="d", budget=(1e6, 1e-5))
    options: dict[str, Any] = {"max_steps": 1, "max_epochs": -1}
    real = {"test_seed": None, "ledger": ledger, "journal_dir": str(tmp_path)}
    trainer(tmp_path, user_privacy(user_sampling="examples", **real), **options).fit(
        Regression(), loader()
    )
    (entry,) = ledger.entries()
    assert entry.releases[0].group_size == GROUP
    with pytest.raises(ConfigurationError, match="protect the same unit"):
        trainer(tmp_path, privacy(expected_batch_size=4, **real), **options).fit(
            Regression(), loader()
        )
