"""The closing table."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.reports import (
    NOT_COVERED,
    PrivacySummary,
    not_covered,
    print_summary,
    summary_rows,
)
from lightning_privacy.types import NeighbouringRelation


def summary(*, deterministic: bool = False, **changes: Any) -> PrivacySummary:
    plan = PrivacyPlan(
        relation=NeighbouringRelation.ADD_OR_REMOVE,
        sample_rate=0.01,
        expected_batch_size=512,
        noise_multiplier=1.1,
        clip_norm=1.0,
        steps=100,
        delta=1e-6,
        deterministic=deterministic,
    )
    fields: dict[str, Any] = {
        "plan": plan,
        "epsilon": 2.0,
        "epsilon_at_stop": 2.0,
        "planned_steps": 100,
        "steps": 100,
    }
    return PrivacySummary(**{**fields, **changes})


def test_every_figure_of_the_mechanism_is_there() -> None:
    rows = dict(summary_rows(summary()))
    assert rows["privacy unit"] == "example"
    assert rows["neighbours"] == "one unit added or removed"
    assert rows["epsilon spent"] == "2"
    assert rows["delta"] == "1e-06"
    assert rows["noise multiplier"] == "1.1000"
    assert rows["sample rate"] == "0.01"
    assert rows["private steps"] == "100 of 100 planned"
    assert rows["clip norm"] == "1"
    assert rows["expected batch size"] == "512"


def test_an_early_stop_keeps_the_planned_epsilon_as_the_headline() -> None:
    rows = summary_rows(summary(epsilon=2.0, epsilon_at_stop=1.5, steps=60))
    labels = [label for label, _ in rows]
    first = labels.index("epsilon of the planned steps")
    assert labels[first + 1] == "epsilon at the stop, ex-post"
    assert dict(rows)["epsilon of the planned steps"] == "2"
    assert "epsilon spent" not in labels


def test_figures_of_private_data_are_marked() -> None:
    shown = summary(clipped_share=0.25, nonfinite_units=3, validation_loss=1.5)
    marked = {label: value for label, value in summary_rows(shown) if NOT_COVERED in label}
    assert marked == {
        not_covered("share of units clipped"): "25.0%",
        not_covered("units with a non-finite gradient"): "3",
        not_covered("validation loss"): "1.5000",
    }


def test_test_mode_says_that_there_is_no_privacy() -> None:
    rows = dict(summary_rows(summary(deterministic=True, epsilon=float("inf"))))
    assert "no privacy" in rows["epsilon spent"]


def test_a_run_without_a_journal_says_so() -> None:
    assert "journal" in dict(summary_rows(summary(journal=False)))
    assert "journal" not in dict(summary_rows(summary()))


@pytest.mark.parametrize("extra", [[], [(not_covered("validation loss without privacy"), "1.2")]])
def test_the_table_prints_brackets_and_extra_rows(extra: list[tuple[str, str]]) -> None:
    stream = io.StringIO()
    print_summary(summary(validation_loss=1.5), extra, Console(file=stream, width=120))
    printed = stream.getvalue()
    assert "validation loss [not covered by ε]" in printed
    assert ("without privacy [not covered by ε]" in printed) == bool(extra)
