"""What the experiments with users have in common: the methods that are compared, and their plot."""

from __future__ import annotations

import csv
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.sampling import UserIndex
from lightning_privacy.tiers import TierPolicy, VolumeTiers

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ("users", "tiers", "examples", "group privacy")
SEEDS = (0, 1, 2)
Row = tuple[str, float, int, float]  # method, ε, seed, what was reached


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One data set's settings, the same for all methods.

    Args:
        group: Most examples of a user.
        users: Users drawn by a step, on average.
        examples: Examples drawn by a step, on average.
        light: Most examples of a user in the tier with the whole ε.
        steps: Private steps.
        delta: δ.
        epsilons: The ε to compare at.
    """

    group: int
    users: int
    examples: int
    light: int
    steps: int
    delta: float
    epsilons: tuple[float, ...]

    def settings(self, method: str, epsilon: float) -> dict[str, Any]:
        """What distinguishes the methods; all protect a user with the same (ε, δ)."""
        users = {
            "unit": "user",
            "group_size": self.group,
            "expected_batch_size": self.users,
            "epsilon": epsilon,
        }
        if method == "users":
            return users
        if method == "examples":
            return {**users, "user_sampling": "examples", "expected_batch_size": self.examples}
        if method == "tiers":
            # Heavy users at half the ε; only the larger one is published.
            policy = TierPolicy(
                segmentation=VolumeTiers({"light": self.light, "heavy": 1000}),
                targets={"light": epsilon, "heavy": epsilon / 2},
                shares={"light": 0.5, "heavy": 0.5},
            )
            return {**users, "tiers": policy}
        # Group privacy: (ε, δ) for a group of examples from (ε', δ') for one.
        own = epsilon / self.group
        ratio = math.expm1(epsilon) / math.expm1(own)
        return {
            "epsilon": own,
            "delta": self.delta / ratio,
            "expected_batch_size": self.examples,
        }

    def fit(self, model: L.LightningModule, data: Dataset, method: str, epsilon: float) -> None:
        """Train by one of the methods, or ``"without"`` privacy."""
        options = {"delta": self.delta, "clip_norm": 0.5, "journal": False, "print_table": False}
        callbacks = []
        if method != "without":
            callbacks = [DifferentialPrivacy(**{**options, **self.settings(method, epsilon)})]
        trainer = L.Trainer(
            max_steps=self.steps, max_epochs=-1, accelerator="cpu", logger=False,
            callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, batch_size=self.examples, shuffle=True))

    def bounded(self, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """At most ``group`` examples of each user, as group privacy needs."""
        kept = UserIndex([row["user"] for row in rows]).bounded(
            self.group, seed.to_bytes(16, "big")
        )
        return [rows[row] for row in kept.tolist()]

    def plot(self, found: list[Row], path: Path, lines: dict[str, str], **labels: str) -> None:
        """Means over seeds against ε; ``lines`` name the levels without one, and their style."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for method in METHODS:
            means = [
                np.mean([v for m, e, _, v in found if (m, e) == (method, x)]) for x in self.epsilons
            ]
            axes.plot(self.epsilons, means, marker="o", label=method)
        for method, style in lines.items():
            mean = np.mean([v for m, _, _, v in found if m == method])
            axes.axhline(mean, linestyle=style, color="grey", label=method)
        axes.set(xscale="log", **labels)
        axes.set_xticks(self.epsilons, [f"{x:g}" for x in self.epsilons])
        axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def split(rows: list[dict[str, Any]], seed: int) -> tuple[list, list]:
    """Rows of four fifths of the users, and those of the others."""
    names = sorted({row["user"] for row in rows})
    order = np.random.default_rng(seed).permutation(len(names))
    held = {names[number] for number in order[: len(names) // 5]}
    return [r for r in rows if r["user"] not in held], [r for r in rows if r["user"] in held]


def write(found: list[Row], path: Path, reached: str) -> None:
    """One row a run; ``reached`` is the name of what was measured."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "epsilon", "seed", reached])
        table.writerows((m, f"{e:g}", s, f"{v:.4f}") for m, e, s, v in found)
