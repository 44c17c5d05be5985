"""The shipped trainer passes its audit on two ranks, and one that is broken there does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.audit import verify_trainer
from tests.audit.rank_mutants import RANK_MUTANTS, result_of
from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(rule) for rule in LIGHTNING_NOISE]

ROOT = Path(__file__).parents[2]
SCRIPT = """
from lightning_privacy import DifferentialPrivacy
from lightning_privacy.audit import verify_trainer

def quiet(noise_multiplier, **settings):
    return DifferentialPrivacy(noise_multiplier=0.9 * noise_multiplier, **settings)

if __name__ == "__main__":
    where = {"devices": 2, "strategy": "private_ddp"}
    good, bad = (verify_trainer(a, **where) for a in (DifferentialPrivacy, quiet))
    print(good.passed, len(good.checks), bad.passed, len(bad.checks), good.error, bad.error)
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    found.stop()


def test_two_ranks_of_the_shipped_trainer_pass(processes: Processes) -> None:
    first, second = processes.run(result_of, None, {})
    assert first == second
    passed, _, checks, text = first
    assert passed, text
    assert checks > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RANK_MUTANTS))
def test_ranks_that_are_broken_are_caught(processes: Processes, name: str) -> None:
    first, second = processes.run(result_of, name, {})
    passed, reasons, _, text = first
    assert first == second
    assert not passed, f"{name} survives"
    assert any(RANK_MUTANTS[name].sign in reason for reason in reasons), text


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rows_of_a_user": 6},
        {"adapters": True},
        {"clipping": "per_layer"},
        {"strategy": "private_fsdp"},
    ],
    ids=str,
)
def test_two_ranks_pass_in_every_mode(processes: Processes, options: dict[str, object]) -> None:
    first, _ = processes.run(result_of, None, options)
    assert first[0], first[-1]


@pytest.mark.slow
def test_processes_that_end_with_each_fit_are_audited() -> None:
    environment = dict(os.environ)
    audit = verify_trainer(DifferentialPrivacy, devices=2, strategy="private_ddp_fork")
    assert audit.passed, str(audit)
    assert dict(os.environ) == environment


@pytest.mark.slow
def test_a_script_audits_the_processes_that_lightning_starts_for_it(tmp_path: Path) -> None:
    script = tmp_path / "audit.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    # Both processes say the same.
    assert sorted(done.stdout.split("\n"))[1:] == ["True 63 False 63 None None"] * 2


def test_more_devices_than_ranks_is_a_failed_audit() -> None:
    audit = verify_trainer(DifferentialPrivacy, devices=2, strategy="private")
    assert not audit.passed
    assert "devices=2" in str(audit.error)


def test_there_are_enough_mutants_of_ranks() -> None:
    areas = [mutant.area for mutant in RANK_MUTANTS.values()]
    assert len(areas) >= 12
    assert {"sampling", "clipping", "noise", "normalising", "ledger"} == set(areas)
