"""The closing table of a private run: what was promised, what was spent, what has no promise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_privacy.accounting.rounding import shown_epsilon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lightning_privacy.accounting import GaussianRelease
    from lightning_privacy.plan import PrivacyPlan

NOT_COVERED = "not covered by ε"
"""Marks every figure that was computed on private data without noise."""

Row = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySummary:
    """What one private run promised, spent and saw.

    Args:
        plan: What the run was planned to do.
        epsilon: ε of the planned steps, with everything released before and since; the headline.
        epsilon_at_stop: ε of the steps actually made. Smaller than ``epsilon`` after an early stop,
            and then valid only as an ex-post figure, because the stop may depend on the data.
        planned_steps: Private steps planned, earlier ones of the same ledger included.
        steps: Private steps charged, those of a crash included.
        clipped_share: Share of units whose gradient was longer than the clip norm, in [0, 1].
        nonfinite_units: Units whose gradient was not finite; each contributed zero.
        validation_loss: The last validation loss that the module logged.
        journal: Whether a journal charges what a crash would otherwise lose.
        releases: Everything charged, as the accountant adds it up.
    """

    plan: PrivacyPlan
    epsilon: float
    epsilon_at_stop: float
    planned_steps: int
    steps: int
    clipped_share: float | None = None
    nonfinite_units: int = 0
    validation_loss: float | None = None
    journal: bool = True
    releases: tuple[GaussianRelease, ...] = ()


def not_covered(label: str) -> str:
    """Mark a label whose figure was computed on private data without noise.

    Args:
        label: What the figure is called.

    Returns:
        The label with the mark behind it.
    """
    return f"{label} [{NOT_COVERED}]"


def summary_rows(summary: PrivacySummary, extra_rows: Sequence[Row] = ()) -> list[Row]:
    """Lay a summary out as labels and values.

    Args:
        summary: What the run promised, spent and saw.
        extra_rows: Labels and values to add below; mark their labels with `not_covered` where
            they come from private data.

    Returns:
        The rows, in the order in which they are shown.
    """
    return [*covered_rows(summary), *uncovered_rows(summary), *extra_rows]


def covered_rows(summary: PrivacySummary) -> list[Row]:
    """Lay out what follows from the plan and the number of steps.

    Args:
        summary: What the run promised, spent and saw.

    Returns:
        The rows.
    """
    rows: list[Row] = []
    for label, value in summary.plan.describe().items():
        if label == "epsilon":
            rows.extend(_epsilon_rows(summary))
        elif label == "private steps":
            rows.append((label, f"{summary.steps} of {summary.planned_steps} planned"))
        else:
            rows.append((label, value))
    if not summary.journal and not summary.plan.deterministic:
        rows.append(("journal", "none: steps lost in a crash are not charged on resume"))
    return rows


def uncovered_rows(summary: PrivacySummary) -> list[Row]:
    """Lay out what was computed on private data without noise, each label marked so.

    Args:
        summary: What the run promised, spent and saw.

    Returns:
        The rows.
    """
    rows: list[Row] = []
    clipped = "examples" if summary.plan.user_sampling == "examples" else "units"
    if summary.clipped_share is not None:
        rows.append((not_covered(f"share of {clipped} clipped"), f"{summary.clipped_share:.1%}"))
    rows.append(
        (not_covered(f"{clipped} with a non-finite gradient"), str(summary.nonfinite_units))
    )
    if summary.validation_loss is not None:
        rows.append((not_covered("validation loss"), f"{summary.validation_loss:.4f}"))
    return rows


def _epsilon_rows(summary: PrivacySummary) -> list[Row]:
    if summary.plan.deterministic:
        return [("epsilon spent", summary.plan.describe()["epsilon"])]
    if math.isclose(summary.epsilon, summary.epsilon_at_stop, rel_tol=1e-9):
        return [("epsilon spent", shown_epsilon(summary.epsilon))]
    return [
        ("epsilon of the planned steps", shown_epsilon(summary.epsilon)),
        ("epsilon at the stop, ex-post", shown_epsilon(summary.epsilon_at_stop)),
    ]


def print_summary(
    summary: PrivacySummary, extra_rows: Sequence[Row] = (), console: Console | None = None
) -> None:
    """Print the closing table.

    Args:
        summary: What the run promised, spent and saw.
        extra_rows: Labels and values to add below; see `summary_rows`.
        console: Where to print; standard output by default.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Differential privacy of this run", show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for label, value in summary_rows(summary, extra_rows):
        # As Text: square brackets would be read as markup.
        table.add_row(Text(label), Text(value))
    (console or Console()).print(table)
