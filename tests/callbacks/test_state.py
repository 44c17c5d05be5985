"""The books of a run, by themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_privacy import BudgetExceededError, ConfigurationError, UnsupportedOperationError
from lightning_privacy.accounting import Journal
from lightning_privacy.callbacks._state import RunState, journal_directory
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.types import NeighbouringRelation


def trainer_at(place: str) -> Any:
    return SimpleNamespace(checkpoint_callback=None, default_root_dir=place)


def state_of(**changes: Any) -> RunState:
    fields: dict[str, Any] = {
        "relation": NeighbouringRelation.ZERO_OUT,
        "sample_rate": 0.1,
        "expected_batch_size": 4,
        "noise_multiplier": 1.0,
        "clip_norm": 1.0,
        "steps": 1000,
        "delta": 1e-5,
    }
    state = RunState()
    state.plan = PrivacyPlan(**{**fields, **changes})
    return state


def test_releases_are_numbered_and_draws_are_charged() -> None:
    state = state_of(releases_per_draw=2)
    assert [state.charge(0), state.charge(1), state.charge(0)] == [0, 1, 2]
    assert state.ledger.count == state.steps == 2
    with pytest.raises(UnsupportedOperationError, match="release 3 on one draw"):
        state.charge(2)


def test_the_limit_is_kept_whatever_the_trainer_does() -> None:
    state = state_of()
    state.limit = 2
    state.charge(0)
    state.charge(0)
    with pytest.raises(BudgetExceededError, match="2 steps charged"):
        state.charge(0)
    assert state.ledger.count == state.releases == 2


def test_a_draw_is_never_handed_out_again() -> None:
    state = state_of()
    state.drawn(5)
    state.drawn(3)
    assert state.cursor == 5


def test_a_release_is_on_disk_before_it_happens(tmp_path: Path) -> None:
    state = state_of()
    state.open_journal(tmp_path)
    assert state.journal is not None
    path = state.journal.path
    for count in range(1, 25):
        state.charge(0)
        # Blocks of a hundredth of the run.
        assert count <= Journal(path, 1).reserved < count + 10
    state.settle_journal()
    assert Journal(path, 1).reserved == 24


def test_a_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    first, second = state_of(), RunState()
    first.open_journal(tmp_path)
    first.drawn(4)
    for _ in range(3):
        first.charge(0)
    saved = first.state_dict()
    assert first.journal is not None
    assert Journal(first.journal.path, 1).reserved == 3
    first.charge(0)
    with pytest.warns(UserWarning, match="10 private steps since the checkpoint"):
        second.restore(saved, [], journal=True)
    assert second.ledger.count == 13
    assert second.cursor == 14
    assert second.releases == 13
    assert second.steps == 3
    assert second.run == first.run


def test_a_state_is_empty_before_anything_was_planned() -> None:
    assert RunState().state_dict() == {}


def test_a_journal_needs_a_disk() -> None:
    with pytest.raises(ConfigurationError, match="journal_dir"):
        journal_directory(None, trainer_at("s3://bucket/checkpoints"))
    assert journal_directory(None, trainer_at("some/where")) == Path("some/where")
    assert journal_directory("else/where", trainer_at("s3://bucket")) == Path("else/where")
    assert journal_directory(None, None) == Path()


def test_a_checkpoint_asked_for_while_a_release_is_charged_leaves_the_journal_alone(
    tmp_path: Path,
) -> None:
    state = state_of()
    state.open_journal(tmp_path)
    for _ in range(10):
        state.charge(0)
    journal = state.journal
    assert journal is not None
    saved: list[dict[str, Any]] = []
    promise = journal.reserve

    def interrupted(up_to: int, release: Any) -> None:
        saved.append(state.state_dict())  # what a signal's handler does
        promise(up_to, release)
        saved.append(state.state_dict())

    journal.reserve = interrupted  # type: ignore[method-assign]
    state.charge(0)
    assert Journal(journal.path, 1).reserved == 20
    for checkpoint in saved:
        later = RunState()
        with pytest.warns(UserWarning, match="10 private steps since the checkpoint"):
            later.restore(checkpoint, [], journal=True)
        assert later.ledger.count == 20
        Journal(journal.path, 1).reserve(20, state.plan.release(1))  # type: ignore[union-attr]
