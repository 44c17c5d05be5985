"""Figures of trained models: what they reach and leak, and how their components went."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning_privacy.reports.outcomes import Outcome

COMPONENTS = {
    "train_loss": "task loss (nats)",
    "privacy/noise_to_signal": "noise to signal of the gradient",
    "privacy/clipped_share": "share of examples clipped",
    "privacy/clipped_mass": "share of gradient length clipped away",
    "attention_noise/perturbation": "attention moved by noise",
}
"""What is logged of the objective's components (the paper's Figure 3), by name."""

INDICATORS = {
    "val_loss": "validation loss (nats)",
    "val_accuracy": "validation accuracy",
    "privacy/mean_norm": "mean gradient norm of an example",
    "privacy/epsilon": "ε spent",
}
"""What is logged of the training (the paper's Figure 4), by name."""


def plot_outcomes(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw accuracy and privacy leakage of each model, mean and deviation over seeds.

    Args:
        outcomes: At least one.
        path: Where to; an SVG.
    """
    figure, axes = _subplots(2, width=9.0)
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        shown = "" if math.isinf(outcome.epsilon) else f", ε = {outcome.budget:g}"
        groups[outcome.model + shown].append(outcome)
    names = list(groups)[::-1]
    for axis, figure_name, title in zip(
        axes, ("accuracy", "advantage"), ("accuracy", "privacy leakage (advantage)"), strict=True
    ):
        values = [[getattr(o, figure_name) for o in groups[name]] for name in names]
        means, spread = [np.mean(v) for v in values], [np.std(v) for v in values]
        axis.barh(names, means, xerr=spread, color="tab:blue", alpha=0.7, capsize=2)
        axis.set_title(title)
    axes[1].set_yticklabels([])
    axes[1].axvline(0, color="gray", linewidth=1)
    _save(figure, path)


def plot_components(logs: Sequence[Path], components: Path, indicators: Path) -> None:
    """Draw what was logged while training, a line for each run.

    Args:
        logs: Files ``metrics.csv`` of Lightning's CSVLogger; the folder two above names the run.
        components: Where the components of the objective go.
        indicators: Where the indicators of the training go.
    """
    series = {path.parts[-3]: _read(path) for path in logs}
    for target, wanted in ((components, COMPONENTS), (indicators, INDICATORS)):
        found = [name for name in wanted if any(name in run for run in series.values())]
        if not found:
            continue
        figure, axes = _subplots(len(found), width=3.2 * len(found))
        for axis, name in zip(axes, found, strict=True):
            for run, columns in series.items():
                if name in columns:
                    # A line of one point would not be seen.
                    marker = "." if len(columns[name]) == 1 else None
                    axis.plot(*zip(*columns[name], strict=True), label=_budget(run), marker=marker,
                              color=_colour(run), linewidth=0.8, alpha=0.7)  # fmt: skip
            axis.set_title(wanted[name], fontsize=9)
            axis.set_xlabel("epoch")
        handles, labels = axes[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes[0].legend(unique.values(), unique.keys(), fontsize=7)
        _save(figure, target)


def _read(path: Path) -> dict[str, list[tuple[float, float]]]:
    """By name, pairs of epoch (with its fraction) and value."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = max((int(row["step"]) for row in rows), default=0) + 1
    epochs = max((int(row["epoch"]) for row in rows if row["epoch"]), default=0) + 1
    for row in rows:
        for name in (*COMPONENTS, *INDICATORS):
            if row.get(name):
                place = (int(row["step"]) + 1) * epochs / steps
                found[name].append((place, float(row[name])))
    return found


def _budget(run: str) -> str:
    budget = run.rpartition("-seed")[0].rpartition("eps")[2]
    return f"ε = {budget}"


def _colour(run: str) -> str:
    # A budget has the same colour in every figure.
    number = sum(map(ord, _budget(run))) % 10
    return f"C{number}"


def _subplots(count: int, width: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.2), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, count))


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    # The same figure is the same file.
    with mpl.rc_context({"svg.hashsalt": "lightning_privacy", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
