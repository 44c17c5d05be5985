"""Made-up members: records like any other, coins that nobody can look up, and what they prove."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import ConfigurationError, GuaranteeError, UnsupportedOperationError
from lightning_privacy.callbacks import Canaries
from lightning_privacy.callbacks._canary_rows import WithCanaries, without_canaries
from tests.callbacks.training import (
    BATCH,
    LIGHTNING_NOISE,
    ROWS,
    Regression,
    data,
    loader,
    privacy,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(rule) for rule in LIGHTNING_NOISE]


class Watch(pl.Callback):
    """Sees what the private run draws from."""

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.dataset = trainer.train_dataloader.dataset
        self.step = trainer.strategy.private_run

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.callback_state = trainer.callbacks


class Wide(Regression):
    """Room for directions that do not meet.

    A row that it has nearly learnt has little but the rounding of a wide sum for a residual, which
    the checks of rows may take for a dependence: these tests leave them out.
    """

    def __init__(self) -> None:
        super().__init__(lr=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 2048), torch.nn.Linear(2048, 1))


def rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [
        (3 * torch.randn(3, generator=generator), torch.randn(1, generator=generator))
        for _ in range(count)
    ]


def fitted(directory: Path, canaries: Canaries, *callbacks: Any, **settings: Any) -> Any:
    options = {name: settings.pop(name) for name in ("max_steps", "module") if name in settings}
    own = privacy(**{"test_seed": None, "noise_multiplier": 1.0, **settings})
    module = options.pop("module", None) or Regression()
    made = trainer(directory, canaries, own, *callbacks, max_epochs=None, **options)
    made.fit(module, settings.pop("loaders", None) or loader())
    return own


def test_included_canaries_are_rows_and_the_rate_says_nothing_of_the_coins(tmp_path: Path) -> None:
    rates, coins = set(), set()
    for _ in range(4):
        canaries, watch = Canaries(rows=rows(20)), Watch()
        # A claim that 20 canaries cannot refute by chance: they prove 1.8 at most.
        own = fitted(tmp_path, canaries, watch, max_steps=1, noise_multiplier=0.5)
        assert own.plan is not None
        rates.add(own.plan.sample_rate)
        assert isinstance(watch.dataset, WithCanaries)
        assert len(watch.dataset) == ROWS + int(canaries._member.sum())
        assert without_canaries(watch.dataset) is watch.dataset.base
        coins.add(tuple(canaries._member.tolist()))
    assert rates == {BATCH / (ROWS + 10)}
    # As often as 2**-60 all fall alike; four lengths are the same in one of 350 runs.
    assert len(coins) > 1


def test_a_canary_is_drawn_and_clipped_like_any_row(tmp_path: Path) -> None:
    """With almost no noise and only canaries that pull one way, a step moves by what was drawn."""

    class Pulled(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1, bias=False)
            torch.nn.init.zeros_(self.net.weight)
            self.released: list[float] = []

        def loss(self, batch: Any) -> torch.Tensor:
            return (self.net(batch[0]) * batch[1]).mean()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.released.append(float(self.net.weight.grad[0, 0]))

    silent = TensorDataset(torch.zeros(ROWS, 3), torch.zeros(ROWS, 1))
    steep = [(torch.tensor([50.0, 0, 0]), torch.ones(1)) for _ in range(20)]
    module = Pulled()
    canaries = Canaries(rows=steep)
    own = privacy(test_seed=None, noise_multiplier=1e-4, sample_rate=0.5, clip_norm=2.0,
                  expected_batch_size=10, independence_check=False)  # fmt: skip
    made = trainer(tmp_path, canaries, own, max_steps=60, max_epochs=None)
    made.fit(module, DataLoader(silent, batch_size=BATCH))
    drawn = torch.tensor(module.released) * 10 / 2.0
    # Whole canaries of the clip norm each, and half of those included at each step.
    assert torch.allclose(drawn, drawn.round(), atol=0.01)
    included = int(canaries._member.sum())
    assert drawn.round().max() <= included
    assert float(drawn.mean()) == pytest.approx(included / 2, abs=1.5)


def test_users_get_a_canary_each(tmp_path: Path) -> None:
    class Users(TensorDataset):
        users = tuple(row // 4 for row in range(ROWS))

    watch = Watch()
    own = privacy(test_seed=None, unit="user", group_size=4, expected_batch_size=3)
    canaries = Canaries(rows=rows(10))
    made = trainer(tmp_path, canaries, own, watch, max_steps=2, max_epochs=None)
    made.fit(Regression(), DataLoader(Users(*data().tensors), batch_size=BATCH))
    assert own.plan is not None
    assert own.plan.sample_rate == pytest.approx(3 / (ROWS / 4 + 5))


def test_coins_are_secret(tmp_path: Path) -> None:
    canaries = copy.deepcopy(Canaries(kind="gradient", count=40))
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", save_last=True)
    # Claims that 40 canaries cannot refute by chance: they prove 2.6 at most.
    fitted(tmp_path, canaries, saving, max_steps=3, noise_multiplier=0.5)
    state = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert not any("anar" in str(name) for name in state["callbacks"])
    for look in (pickle.dumps, copy.deepcopy):
        with pytest.raises(GuaranteeError, match="coins"):
            look(canaries)
    first = canaries._member.clone()
    fitted(tmp_path, canaries, max_steps=1, noise_multiplier=0.5)
    assert not torch.equal(first, canaries._member)


def test_a_resumed_fit_is_refused(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", save_last=True)
    fitted(tmp_path, Canaries(kind="gradient", count=10), saving, max_steps=2)
    own = privacy(test_seed=None, noise_multiplier=1.0)
    again = trainer(tmp_path, Canaries(kind="gradient", count=10), own, max_steps=4, max_epochs=9)
    with pytest.raises(GuaranteeError, match="goes on from"):
        again.fit(Regression(), loader(), ckpt_path=tmp_path / "saved" / "last.ckpt")


def test_a_correct_trainer_is_not_refuted(tmp_path: Path) -> None:
    canaries = Canaries(kind="gradient", count=100)
    own = fitted(tmp_path, canaries, max_steps=12, module=Wide(), noise_multiplier=2.0,
                 sample_rate=0.5, independence_check=False)  # fmt: skip
    assert canaries.result is not None
    assert canaries.result.epsilon <= canaries.result.claimed == own.epsilon()
    assert not canaries.result.refuted
    (found,) = canaries.findings()
    assert "REFUTED" not in found.note


def test_a_trainer_without_noise_is_refuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_privacy.noise import GaussianNoise

    monkeypatch.setattr(GaussianNoise, "add_", lambda *_: None)
    canaries = Canaries(kind="gradient", count=100)
    with pytest.warns(UserWarning, match="the claim is wrong"):
        fitted(tmp_path, canaries, max_steps=12, module=Wide(), noise_multiplier=32.0,
               sample_rate=0.5, independence_check=False)  # fmt: skip
    assert canaries.result is not None
    assert canaries.result.refuted
    assert canaries.findings()[0].note.startswith("CLAIM REFUTED")


REFUSED = [
    ({"kind": "song"}, {}, ConfigurationError, "kind"),
    ({"count": 11}, {}, ConfigurationError, "even number"),
    ({"kind": "new_token"}, {}, ConfigurationError, "new_tokens"),
    ({"kind": "text"}, {}, ConfigurationError, "vocab_size"),
    ({"kind": "text", "tokens": 9}, {}, ConfigurationError, "text canaries go among"),
    ({"kind": "gradient"}, {"clipping": "per_layer"}, UnsupportedOperationError, "per_layer"),
]


@pytest.mark.parametrize(("arguments", "settings", "error", "message"), REFUSED)
def test_what_proves_nothing_is_refused(
    tmp_path: Path, arguments: Any, settings: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fitted(tmp_path, Canaries(**arguments), max_steps=1, **settings)


def test_canaries_need_a_private_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Canaries goes with"):
        trainer(tmp_path, Canaries(rows=rows(10))).fit(Regression(), loader())
