"""User-level privacy on real customers: predict from a basket whether it was bought in autumn.

    python docs/benchmarks/users.py online_retail_baskets.jsonl.gz docs/benchmarks

The data are the invoices of UCI's Online Retail (doi 10.24432/C5BW33, CC BY 4.0), one JSON object
a line with `user`, `date` and `items`. Four fifths of the customers are trained on, the others are
the test. Every row of users.csv is one seed; users.svg shows their means.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.sampling import UserIndex
from lightning_privacy.tiers import TierPolicy, VolumeTiers

WIDTH, STEPS, GROUP, DELTA = 512, 80, 4, 1e-5
EPSILONS, SEEDS = (1.0, 2.0, 4.0, 8.0), (0, 1, 2)
USERS, EXAMPLES = 256, 512  # drawn by a step, on average


class Baskets(Dataset):
    """Hashed items of each basket, whether it was bought from October on, and the customer."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.users = [row["user"] for row in rows]
        self.x = torch.stack([features(row["items"]) for row in rows])
        self.y = torch.tensor([float(int(row["date"][5:7]) >= 10) for row in rows])

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def features(items: list[str]) -> torch.Tensor:
    vector = torch.zeros(WIDTH)
    for item in items:
        vector[int(hashlib.blake2b(item.encode(), digest_size=4).hexdigest(), 16) % WIDTH] += 1
    return vector / vector.norm().clamp_min(1)


class Autumn(L.LightningModule):
    """Logistic regression; the loss is a mean over baskets."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.linear.weight)
        self.rate = rate

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.linear(x)[:, 0], y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def accuracy(model: Autumn, test: Baskets) -> float:
    with torch.no_grad():
        return float(((model.linear(test.x)[:, 0] > 0) == (test.y > 0.5)).float().mean())


def split(rows: list[dict[str, Any]], seed: int) -> tuple[list, list]:
    names = sorted({row["user"] for row in rows})
    order = np.random.default_rng(seed).permutation(len(names))
    held = {names[number] for number in order[: len(names) // 5]}
    return [r for r in rows if r["user"] not in held], [r for r in rows if r["user"] in held]


def settings(method: str, epsilon: float) -> dict[str, Any]:
    """What distinguishes the methods; all protect a customer with the same (ε, δ)."""
    users = {"unit": "user", "group_size": GROUP, "expected_batch_size": USERS, "epsilon": epsilon}
    if method == "users":
        return users
    if method == "examples":
        return {**users, "user_sampling": "examples", "expected_batch_size": EXAMPLES}
    if method == "tiers":
        # Heavy customers at half the ε; only the larger one is published.
        policy = TierPolicy(
            segmentation=VolumeTiers({"light": GROUP, "heavy": 1000}),
            targets={"light": epsilon, "heavy": epsilon / 2},
            shares={"light": 0.5, "heavy": 0.5},
        )
        return {**users, "tiers": policy}
    # Group privacy: (ε, δ) for GROUP examples from (ε', δ') for one.
    own = epsilon / GROUP
    ratio = math.expm1(epsilon) / math.expm1(own)
    return {"epsilon": own, "delta": DELTA / ratio, "expected_batch_size": EXAMPLES}


def trained(data: Baskets, method: str, epsilon: float) -> Autumn:
    model = Autumn(rate=0.1)
    options = {"delta": DELTA, "clip_norm": 0.5, "journal": False, "print_table": False}
    callbacks = []
    if method != "without":
        callbacks = [DifferentialPrivacy(**{**options, **settings(method, epsilon)})]
    trainer = L.Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=EXAMPLES, shuffle=True))
    return model


def bounded(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """At most GROUP baskets of each customer, as group privacy needs."""
    kept = UserIndex([row["user"] for row in rows]).bounded(GROUP, seed.to_bytes(16, "big"))
    return [rows[row] for row in kept.tolist()]


def main(source: str, target: str) -> None:
    with gzip.open(source, "rt") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for seed in SEEDS:
        train, test = (split(rows, seed)[0], Baskets(split(rows, seed)[1]))
        share = float(test.y.mean())
        found.append(("no learning", 0.0, seed, max(share, 1 - share)))
        found.append(
            (
                "without privacy",
                math.inf,
                seed,
                accuracy(trained(Baskets(train), "without", 0), test),
            )
        )
        data, few = Baskets(train), Baskets(bounded(train, seed))
        for epsilon in EPSILONS:
            for method in ("users", "examples", "tiers", "group privacy"):
                model = trained(few if method == "group privacy" else data, method, epsilon)
                found.append((method, epsilon, seed, accuracy(model, test)))
                print(*found[-1], flush=True)
    with Path(target, "users.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "epsilon", "seed", "accuracy"])
        table.writerows((m, f"{e:g}", s, f"{a:.4f}") for m, e, s, a in found)
    plot(found, Path(target, "users.svg"))


def plot(found: list[tuple[str, float, int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method in ("users", "tiers", "examples", "group privacy"):
        means = [np.mean([a for m, e, _, a in found if (m, e) == (method, x)]) for x in EPSILONS]
        axes.plot(EPSILONS, means, marker="o", label=method)
    for method, style in (("without privacy", ":"), ("no learning", "--")):
        mean = np.mean([a for m, _, _, a in found if m == method])
        axes.axhline(
            mean,
            linestyle=style,
            color="grey",
            label=method,
        )
    axes.set(xscale="log", xlabel="ε of a customer", ylabel="accuracy on other customers")
    axes.set_xticks(EPSILONS, [f"{x:g}" for x in EPSILONS])
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
