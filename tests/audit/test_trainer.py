"""The shipped trainer passes its audit, and broken ones do not."""

from __future__ import annotations

import os
from typing import Any

import pytest
from torch import nn

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.audit import trainer_tightness, verify_trainer
from lightning_privacy.errors import ConfigurationError
from tests.audit.mutants import MUTANTS
from tests.callbacks.training import LIGHTNING_NOISE

pytestmark = [pytest.mark.filterwarnings(rule) for rule in LIGHTNING_NOISE]

NAMES = sorted(MUTANTS)
# Another five each day; all of them with `python tests/audit/matrix.py`.
TODAY = int(os.environ["LIGHTNING_PRIVACY_TESTS_DAY"])
ROTATING = [NAMES[(5 * TODAY + k) % len(NAMES)] for k in range(5)]


def test_the_shipped_trainer_passes() -> None:
    audit = verify_trainer(DifferentialPrivacy)
    assert audit.passed, str(audit)
    assert len(audit.checks) > 40


@pytest.mark.parametrize(
    "audited", [nn.Linear(2, 2), nn.Linear, DifferentialPrivacy(epsilon=1.0, delta=1e-5)]
)
def test_what_makes_no_callback_is_refused(audited: Any) -> None:
    with pytest.raises(ConfigurationError, match="makes the callback"):
        verify_trainer(audited)


@pytest.mark.parametrize("name", ROTATING)
def test_a_broken_trainer_is_caught(name: str) -> None:
    caught(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_broken_trainer_is_caught(name: str) -> None:
    caught(name)


def caught(name: str) -> None:
    mutant = MUTANTS[name]
    with mutant.broken() as audited:
        audit = verify_trainer(audited, stop_at_failure=True, **mutant.options)
    assert not audit.passed, f"{name} survives"
    reasons = [check.name for check in audit.failures] + [audit.error or ""]
    assert any(mutant.sign in reason for reason in reasons), str(audit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"clipping": "per_layer"},
        {"clipping": "automatic"},
        {"adapters": True},
        {"physical_batch_size": 64},
        {"physical_batch_size": 1},
        {"rows_of_a_user": 3},
        {"rows_of_a_user": 6},
    ],
    ids=str,
)
def test_the_shipped_trainer_passes_in_every_mode(options: dict[str, object]) -> None:
    audit = verify_trainer(DifferentialPrivacy, **options)  # type: ignore[arg-type]
    assert audit.passed, str(audit)


def test_an_error_of_the_trainer_is_a_failed_audit() -> None:
    def refuses(**settings: object) -> object:
        raise ValueError("no")

    audit = verify_trainer(refuses)
    assert not audit.passed
    assert str(audit) == "FAIL ValueError: no"


@pytest.mark.slow
def test_the_bound_comes_near_the_claim() -> None:
    found = trainer_tightness(DifferentialPrivacy)
    assert found.claimed == pytest.approx(4.38, abs=0.01)
    assert 0.85 * found.claimed <= found.epsilon
    assert not found.refuted


@pytest.mark.slow
def test_half_the_noise_refutes_the_claim() -> None:
    with MUTANTS["half the noise"].broken() as audited:
        assert trainer_tightness(audited, canaries=2000).refuted


def test_there_are_enough_mutants() -> None:
    patches = [m.area for m in MUTANTS.values() if m.seam == "source"]
    assert len(MUTANTS) >= 25
    assert len(patches) >= 15
    areas = ("sampling", "clipping", "noise", "normalising", "ledger")
    assert all(patches.count(area) >= 2 for area in areas)
