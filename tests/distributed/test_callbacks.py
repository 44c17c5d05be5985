"""What measures and reports says the same on two ranks as in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_privacy.callbacks import Canaries, LeakageMonitor, PrivacyReport
from tests.callbacks.test_canaries import rows
from tests.callbacks.training import (
    BATCH,
    LIGHTNING_NOISE,
    ROWS,
    Regression,
    loader,
    privacy,
    trainer,
)
from tests.distributed import audit_jobs
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


# ------------------------------------------------------------------ canaries
def test_ranks_throw_the_same_coins(processes: Processes, tmp_path: Path) -> None:
    first, second = processes.run(audit_jobs.row_canaries, str(tmp_path))
    assert first == second
    assert first["rows"] == ROWS + sum(first["member"])
    # The rate says nothing of the coins.
    assert first["rate"] == 2 * BATCH / (ROWS + audit_jobs.CANARIES / 2)
    again, _ = processes.run(audit_jobs.row_canaries, str(tmp_path))
    assert again["member"] != first["member"]


def test_a_canary_is_drawn_on_one_rank(processes: Processes, tmp_path: Path) -> None:
    first, second = processes.run(audit_jobs.drawn_canaries, str(tmp_path), 40)
    assert first == second
    drawn = np.array(first["drawn"])
    np.testing.assert_allclose(drawn, drawn.round(), atol=0.01)
    assert drawn.round().max() <= first["included"]
    assert drawn.mean() == pytest.approx(first["included"] / 2, abs=1.8)


def test_a_gradient_canary_is_added_once(processes: Processes, tmp_path: Path) -> None:
    first, second = processes.run(audit_jobs.gradient_canaries, str(tmp_path), 1e-3, 24, False)
    assert first == second
    seen, member = np.array(first["seen"]), np.array(first["member"])
    # Directions cross, and data lie across them: near 0 and 1, not on them.
    drawn = seen > 0.6
    assert not drawn[:, ~member].any()
    assert drawn[:, member].mean() == pytest.approx(0.5, abs=0.12)
    assert seen.max() < 1.4
    assert seen[drawn].mean() == pytest.approx(1.0, abs=0.05)


def test_a_correct_world_is_not_refuted_and_a_silent_one_is(
    processes: Processes, tmp_path: Path
) -> None:
    found, _ = processes.run(audit_jobs.gradient_canaries, str(tmp_path), 2.0, 8, False)
    assert found["epsilon"] <= found["claimed"]
    assert not found["refuted"]
    # So much noise is claimed that chance cannot hide its lack. The cut is the lowest member of a
    # random fifth: with 100 canaries fewer than the five right guesses that refute ε = 0.18 are
    # left above it in 2 of a million simulated audits, with 60 in 1 of 1,000.
    first, second = processes.run(audit_jobs.gradient_canaries, str(tmp_path), 32.0, 12, True)
    assert first["refuted"] == second["refuted"] is True
    # One of them says so.
    assert [first["warned"], second["warned"]] == [1, 0]


@pytest.mark.parametrize("kind", ["text", "new_token"])
def test_ranks_make_the_same_texts(processes: Processes, tmp_path: Path, kind: str) -> None:
    first, second = processes.run(audit_jobs.text_canaries, str(tmp_path), 2, kind)
    assert first == second
    texts = np.array(first["texts"])
    assert texts.shape == (audit_jobs.CANARIES, 6)
    assert (texts[:, :-1] < 30).all()
    assert (texts[:, -1] >= 30).all() == (kind == "new_token")


@pytest.mark.slow
def test_canaries_go_with_sharded_parameters(processes: Processes, tmp_path: Path) -> None:
    options = {"strategy": "private_fsdp"}
    first, second = processes.run(audit_jobs.row_canaries, str(tmp_path), 2, options)
    assert first == second
    assert first["rows"] == ROWS + sum(first["member"])


# ------------------------------------------------------------------ monitor, report, metrics
def close(first: Any, second: Any) -> None:
    for one, other in zip(first, second, strict=True):
        assert one == [pytest.approx(figures, rel=1e-6) for figures in other]


def test_monitor_report_and_metrics_say_what_one_process_says(
    processes: Processes, tmp_path: Path
) -> None:
    settings = {"noise_multiplier": 0.0}
    one = audit_jobs.measured(str(tmp_path / "one"), 1, settings)
    first, second = processes.run(audit_jobs.measured, str(tmp_path / "two"), 2, settings)
    assert first["history"] == second["history"]
    assert len(first["history"]) == 2
    close(first["history"], one["history"])
    assert first["logged"] == second["logged"] == pytest.approx(one["logged"])
    assert first["auroc"] == second["auroc"] == pytest.approx(one["auroc"])
    # Rank 0 writes the report, of the whole run.
    assert (first["page"], second["page"]) == ("privacy_report.html", None)
    theirs, own = first["record"], one["record"]
    for part in ("guarantee", "plan", "curve", "covered", "not_covered", "ledger", "mechanism"):
        assert theirs[part] == own[part], part
    assert [found["name"] for found in theirs["leakage"]] == [
        "membership by loss, epoch 2",
        "membership by ratio, epoch 2",
    ]
    for name in ("clipped_share", "mean_norm"):
        ours = np.array(own["uncovered"]["series"][name])
        np.testing.assert_allclose(theirs["uncovered"]["series"][name], ours, rtol=1e-6)
    hashes = [record["checkpoint"] for record in (theirs, own)]
    assert hashes[0].keys() == hashes[1].keys()


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_models_of_recipes_are_validated_over_all_ranks(
    processes: Processes, tmp_path: Path, task: str
) -> None:
    first, second = processes.run(audit_jobs.evaluated, str(tmp_path), task)
    alone = audit_jobs.evaluated(str(tmp_path), task, 1)
    assert first == second
    assert alone == pytest.approx(first, rel=1e-5)


def test_the_report_and_the_ledger_say_what_was_spent(processes: Processes, tmp_path: Path) -> None:
    settings = {"noise_multiplier": 1.0, "test_seed": None}
    first, second = processes.run(audit_jobs.measured, str(tmp_path), 2, settings)
    record = first["record"]
    assert record["outcome"] == "completed"
    assert record["guarantee"]["epsilon_at_stop"] == first["epsilon"] == second["epsilon"]
    assert record["ledger"]["data_set"]["runs"] == 1
    assert sum(release["count"] for release in record["ledger"]["releases"]) == 10
    text = (tmp_path / "report" / "privacy_report.html").read_text()
    assert "not covered" in text.lower()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_is_reported_and_charged(
    processes: Processes, tmp_path: Path, rank: int
) -> None:
    found = processes.run(audit_jobs.failing, str(tmp_path), rank)
    assert found[rank]["error"] == "OSError"
    assert found[1 - rank]["error"] == "GuaranteeError"
    assert [each["page"] for each in found] == [True, False]
    # Rank 0 writes down what it is about to release before it hears of the others.
    charged = 3 + rank
    assert audit_jobs.spent(tmp_path) == [charged]
    record = json.loads((tmp_path / "report" / "privacy_report.json").read_text())
    assert record["outcome"].startswith(f"The run ended with {found[0]['error']}.")
    assert record["guarantee"]["steps"] == charged


def test_a_spent_budget_refuses_the_next_run_of_all_ranks(
    processes: Processes, tmp_path: Path
) -> None:
    first, second = processes.run(audit_jobs.over_budget, str(tmp_path))
    assert first == second
    assert first["errors"] == ["BudgetExceededError"]
    assert first["steps"] == [5, 0]
    assert audit_jobs.spent(tmp_path) == [5]


# ------------------------------------------------------------------ processes that are gone
def test_what_forked_processes_find_comes_home(tmp_path: Path) -> None:
    canaries, monitor = Canaries(rows=rows(audit_jobs.CANARIES)), LeakageMonitor(rows=8)
    report = PrivacyReport(directory=str(tmp_path / "report"))
    callback = privacy(test_seed=None, noise_multiplier=1.0)
    made = trainer(
        tmp_path, canaries, monitor, report, callback, strategy="private_ddp_fork", devices=2
    )
    environment = dict(os.environ)
    try:
        made.fit(Regression(), loader(), loader())
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
    assert canaries.result is not None
    assert canaries.result.claimed == callback.epsilon()
    assert len(monitor.history) == 1
    assert report.page == tmp_path / "report" / "privacy_report.html"
    assert len(canaries.findings()) + len(monitor.findings()) == 3
