"""Tables of trained models."""

from __future__ import annotations

import math

import pytest

from lightning_privacy.reports.outcomes import Outcome, markdown, read_csv, rows_of, write_csv
from lightning_privacy.reports.plots import plot_components, plot_outcomes


def outcome(model: str, seed: int, accuracy: float, epsilon: float = math.inf) -> Outcome:
    return Outcome(
        model=model, budget=8.0 if epsilon < 9 else math.inf, epsilon=epsilon, seed=seed,
        accuracy=accuracy, f1=0.5, auroc=0.75, advantage=0.1, lower=-0.1, upper=0.3,
        tpr_at_1_percent_fpr=0.02, train_accuracy=0.9, steps=10, seconds=1.5,
    )  # fmt: skip


FOUND = [
    outcome("plain", 0, 0.9), outcome("plain", 1, 0.8),
    outcome("private", 0, 0.6, 7.9), outcome("private", 1, 0.5, 7.951),
]  # fmt: skip


def test_a_row_is_mean_and_deviation_over_seeds():
    plain, private = rows_of(FOUND)
    assert plain[:3] == ["plain", "∞", "0.850 ± 0.071"]
    assert private[:3] == ["private", "7.951", "0.550 ± 0.071"]
    assert private[5:] == ["0.100 ± 0.000", "-0.100 to +0.300", "0.020 ± 0.000", "2"]
    assert rows_of(FOUND[:1])[0][2] == "0.900"


def test_budgets_are_rows_of_their_own():
    assert len(rows_of([outcome("a", 0, 0.5, 7.9), outcome("a", 0, 0.5)])) == 2


def test_markdown_has_as_many_cells_in_each_line():
    lines = markdown(FOUND).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {10}


def test_a_file_holds_what_was_written(tmp_path):
    write_csv(FOUND, tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv") == FOUND


def test_figures_are_drawn_from_logs(tmp_path):
    pytest.importorskip("matplotlib")
    log = tmp_path / "full-eps8-seed0" / "log" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(
        "epoch,step,train_loss,privacy/clipped_mass,val_accuracy\n"
        "0,0,2.0,0.9,\n0,1,1.5,0.8,\n0,1,,,0.4\n1,2,1.0,0.7,\n1,3,0.5,0.6,\n1,3,,,0.8\n"
    )
    plot_components([log], tmp_path / "components.svg", tmp_path / "indicators.svg")
    plot_outcomes(FOUND, tmp_path / "table.svg")
    assert "task loss" in (tmp_path / "components.svg").read_text()
    assert "validation accuracy" in (tmp_path / "indicators.svg").read_text()
    assert "private, ε = 8" in (tmp_path / "table.svg").read_text()
    first = (tmp_path / "table.svg").read_bytes()
    plot_outcomes(FOUND, tmp_path / "table.svg")
    assert (tmp_path / "table.svg").read_bytes() == first
