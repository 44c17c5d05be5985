"""Random numbers of the training step are secret, and the user's generators are given back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_privacy.callbacks import StudyMode
from lightning_privacy.callbacks._chance import secret_chance, secret_words, with_words
from lightning_privacy.study import Study
from tests.callbacks.training import LIGHTNING_NOISE, ROWS, Regression, loader, privacy, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


def numbers() -> list[float]:
    from_numpy = np.random.rand()  # noqa: NPY002 - the global one
    return [float(torch.rand(())), random.random(), float(from_numpy)]


def seed() -> None:
    """As `seed_everything` does, but for the environment."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global one


class Chance(Regression):
    """Notes what its steps get from the generators."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.seen: list[list[float]] = []
        self.fails = fails

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(numbers())
        if self.fails and self.global_step:
            raise OSError("no disk")
        return F.dropout(super().training_step(batch, batch_idx), 0.0)


def seen(folder: Path, **settings: Any) -> list[list[float]]:
    whole = {"sample_rate": 1.0, "expected_batch_size": ROWS, "independence_check": False}
    callback = privacy(**{"test_seed": None, "noise_multiplier": 1.0, **whole, **settings})
    return seen_by(folder, callback)


def seen_by(folder: Path, callback: pl.Callback) -> list[list[float]]:
    seed()
    module = Chance()
    trainer(folder, callback, max_steps=2, max_epochs=None).fit(module, loader())
    return module.seen


def test_all_words_of_the_generator_are_exchanged() -> None:
    words, known = secret_words(), torch.Generator().manual_seed(3)
    known.set_state(with_words(known.get_state(), words))
    twister = np.random.RandomState()
    twister.set_state(("MT19937", words.numpy().astype(np.uint32), 624))
    # Torch takes two words for each number, and uses the lower bits of the second.
    expected = twister.randint(0, 2**32, 4000, dtype=np.uint32)[1::2]
    found = torch.empty(2000, dtype=torch.int64).random_(0, 2**31, generator=known)
    np.testing.assert_array_equal(found.numpy(), expected % 2**31)


def test_a_seed_does_not_tell_what_a_step_draws(tmp_path: Path) -> None:
    first, second = seen(tmp_path), seen(tmp_path)
    for one, other in zip(first, second, strict=True):
        assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:STUDY MODE")
def test_where_nothing_is_promised_a_seed_repeats_them(tmp_path: Path) -> None:
    assert seen(tmp_path, test_seed=3) == seen(tmp_path, test_seed=3)
    study = Study(without=("noise",), not_private=True)
    options = {"test_seed": None, "sample_rate": 1.0, "expected_batch_size": ROWS}
    own = [StudyMode(privacy(**options), study) for _ in range(2)]
    assert seen_by(tmp_path, own[0]) == seen_by(tmp_path, own[1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_generators_go_on_after_the_fit(tmp_path: Path, fails: bool) -> None:
    seed()
    expected = numbers()
    seed()
    own = privacy(test_seed=None, noise_multiplier=1.0, independence_check=False)
    made = trainer(tmp_path, own, max_steps=3, max_epochs=None)
    if fails:
        with pytest.raises(OSError, match="no disk"):
            made.fit(Chance(fails=True), loader())
    else:
        made.fit(Chance(), loader())
    assert numbers() == expected


def test_what_a_module_draws_before_the_fit_is_repeated(tmp_path: Path) -> None:
    class Late(Chance):
        def configure_model(self) -> None:
            self.drawn = numbers()

    drawn = []
    for _ in range(2):
        seed()
        module = Late()
        own = privacy(test_seed=None, noise_multiplier=1.0)
        trainer(tmp_path, own, max_steps=1, max_epochs=None).fit(module, loader())
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]


def test_nested_states_are_restored_in_order() -> None:
    seed()
    expected = numbers()
    seed()
    with secret_chance():
        assert numbers() != expected
    assert numbers() == expected
