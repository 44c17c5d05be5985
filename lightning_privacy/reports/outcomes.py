"""Tables of trained models: mean and deviation over seeds, as Markdown and CSV."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lightning_privacy.accounting.rounding import shown_epsilon

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COLUMNS = (
    ("model", "left"),
    ("ε", "right"),
    ("accuracy", "right"),
    ("F1", "right"),
    ("AUROC", "right"),
    ("privacy leakage", "right"),
    ("its 95 % interval", "right"),
    ("TPR at 1 % FPR", "right"),
    ("seeds", "right"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one trained model reached. Not covered by ε, except for ``epsilon`` itself.

    Args:
        model: Row of the table.
        budget: The ε that was planned for; infinite in study mode. Rows differ by it.
        epsilon: The ε that was spent; infinite in study mode.
        seed: Of the initial weights, and of who is held out.
        accuracy: On the test, in [0, 1].
        f1: Mean over the classes.
        auroc: Of the task: mean over the classes, each against the others.
        advantage: Privacy leakage: membership advantage in [−1, 1].
        lower: Lower end of its 95 % interval.
        upper: Upper end.
        tpr_at_1_percent_fpr: Of the same attack.
        train_accuracy: On the examples trained on.
        steps: Optimizer steps.
        seconds: Of the training.
    """

    model: str
    budget: float
    epsilon: float
    seed: int
    accuracy: float
    f1: float
    auroc: float
    advantage: float
    lower: float
    upper: float
    tpr_at_1_percent_fpr: float
    train_accuracy: float
    steps: int
    seconds: float


def rows_of(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Average over seeds.

    Args:
        outcomes: Any; those of the same model and budget are averaged.

    Returns:
        A row of cells, as `COLUMNS`, for each model and budget, in the order of their first one.
    """
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.model, outcome.budget), []).append(outcome)
    return [_row(group) for group in groups.values()]


def _row(group: list[Outcome]) -> list[str]:
    # The largest of the seeds, which all keep the same budget.
    spent = max(outcome.epsilon for outcome in group)
    ends = [statistics.mean(getattr(o, name) for o in group) for name in ("lower", "upper")]
    return [
        group[0].model,
        "∞" if math.isinf(spent) else shown_epsilon(spent),
        *[_mean(group, name) for name in ("accuracy", "f1", "auroc", "advantage")],
        f"{ends[0]:+.3f} to {ends[1]:+.3f}",
        _mean(group, "tpr_at_1_percent_fpr"),
        str(len(group)),
    ]


def _mean(group: list[Outcome], name: str) -> str:
    values = [getattr(outcome, name) for outcome in group]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Write the table in Markdown.

    Args:
        outcomes: Any.

    Returns:
        Lines of a table, mean ± standard deviation over seeds.
    """
    lines = [
        [name for name, _ in COLUMNS],
        ["---" if side == "left" else "--:" for _, side in COLUMNS],
        *rows_of(outcomes),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one line for each trained model.

    Args:
        outcomes: At least one.
        path: Where to; replaced.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(outcomes[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(outcome).items()}
            for outcome in outcomes
        )


def read_csv(path: Path) -> list[Outcome]:
    """Read what `write_csv` wrote.

    Args:
        path: The file.

    Returns:
        The outcomes.
    """
    kinds = {"model": str, "seed": int, "steps": int}
    with path.open(newline="") as file:
        return [
            Outcome(**{name: kinds.get(name, float)(text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]
