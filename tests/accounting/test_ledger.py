from __future__ import annotations

import math

import pytest
import torch

from lightning_privacy.accounting import Ledger, epsilon
from lightning_privacy.errors import GuaranteeError
from tests.accounting.goldens import release


def test_an_empty_ledger_has_spent_nothing():
    ledger = Ledger()
    assert ledger.epsilon(1e-5) == 0
    assert ledger.delta(1.0) == 0
    assert ledger.count == 0
    assert ledger.releases == ()


def test_releases_add_up_and_equal_neighbours_merge():
    ledger = Ledger()
    for _ in range(3):
        ledger.record(release(1.0, 0.1))
    ledger.record(release(2.0, 0.1, 0))
    ledger.record(release(2.0, 0.1, 4))
    ledger.record(release(1.0, 0.1))
    assert ledger.releases == (release(1.0, 0.1, 3), release(2.0, 0.1, 4), release(1.0, 0.1))
    assert ledger.count == 8
    assert ledger.epsilon(1e-5) == epsilon([release(1.0, 0.1, 4), release(2.0, 0.1, 4)], 1e-5)
    assert ledger.epsilon(1e-5, "rdp") > ledger.epsilon(1e-5)
    assert 0 < ledger.delta(1.0) < 1


def test_no_noise_is_not_forgotten():
    ledger = Ledger([release(0.0, 0.1)])
    ledger.record(release(1.0, 0.1))
    assert ledger.epsilon(1e-5) == math.inf


def test_the_entries_cannot_be_changed_from_outside():
    ledger = Ledger([release(1.0, 0.1)])
    assert isinstance(ledger.releases, tuple)
    with pytest.raises(AttributeError):
        ledger.releases = ()


def test_the_state_survives_a_checkpoint_with_weights_only(tmp_path):
    ledger = Ledger([release(1.0, 0.1, 3), release(2.0, 0.1, 4)])
    path = tmp_path / "state.ckpt"
    torch.save({"ledger": ledger.state_dict()}, path)
    loaded = Ledger()
    loaded.load_state_dict(torch.load(path, weights_only=True)["ledger"])
    assert loaded.releases == ledger.releases


def test_only_releases_are_recorded():
    with pytest.raises(GuaranteeError, match="a ledger records `GaussianRelease` values only"):
        Ledger().record((1.0, 0.1, 3))


def test_loading_forgets_nothing():
    ledger = Ledger([release(1.0, 0.1)])
    with pytest.raises(GuaranteeError, match="must be empty when a stored one is loaded"):
        ledger.load_state_dict(Ledger().state_dict())


@pytest.mark.parametrize("state", [{}, {"version": 2, "releases": []}, {"version": 1}])
def test_an_unknown_state_is_refused(state):
    with pytest.raises(GuaranteeError, match="a stored ledger must have version 1"):
        Ledger().load_state_dict(state)


def test_a_damaged_entry_is_refused_and_nothing_is_loaded():
    state = Ledger([release(1.0, 0.1), release(2.0, 0.1)]).state_dict()
    del state["releases"][1]["count"]
    ledger = Ledger()
    with pytest.raises(GuaranteeError, match="exactly the fields"):
        ledger.load_state_dict(state)
    assert ledger.count == 0
