"""User-level privacy on real customers: predict from a basket whether it was bought in autumn.

    python docs/benchmarks/users.py online_retail_baskets.jsonl.gz docs/benchmarks

The data are the invoices of UCI's Online Retail (doi 10.24432/C5BW33, CC BY 4.0), one JSON object
a line with `user`, `date` and `items`. Four fifths of the customers are trained on, the others are
the test. Every row of users.csv is one seed; users.svg shows their means.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from user_methods import METHODS, SEEDS, Work, split, write

WIDTH = 512  # hashed items
WORK = Work(
    group=4, users=256, examples=512, light=4, steps=80, delta=1e-5, epsilons=(1.0, 2.0, 4.0, 8.0)
)


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


def trained(data: Baskets, method: str, epsilon: float) -> Autumn:
    model = Autumn(rate=0.1)
    WORK.fit(model, data, method, epsilon)
    return model


def main(source: str, target: str) -> None:
    with gzip.open(source, "rt") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for seed in SEEDS:
        train, held = split(rows, seed)
        data, few, test = Baskets(train), Baskets(WORK.bounded(train, seed)), Baskets(held)
        share = float(test.y.mean())
        found.append(("no learning", 0.0, seed, max(share, 1 - share)))
        plain = accuracy(trained(data, "without", 0), test)
        found.append(("without privacy", math.inf, seed, plain))
        for epsilon in WORK.epsilons:
            for method in METHODS:
                model = trained(few if method == "group privacy" else data, method, epsilon)
                found.append((method, epsilon, seed, accuracy(model, test)))
                print(*found[-1], flush=True)
    write(found, Path(target, "users.csv"), "accuracy")
    WORK.plot(
        found,
        Path(target, "users.svg"),
        {"without privacy": ":", "no learning": "--"},
        xlabel="ε of a customer",
        ylabel="accuracy on other customers",
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
