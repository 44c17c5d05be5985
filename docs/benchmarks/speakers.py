"""User-level privacy of a language model: who speaks in Shakespeare, and what do they say?

    python docs/benchmarks/speakers.py shakespeare_users.jsonl docs/benchmarks

The data are the speeches of Tiny Shakespeare, one JSON object a line with `user` and `text`.
Speakers with at least 20 speeches take part; four fifths are trained on, the others are the test.
Every row of speakers.csv is one seed; speakers.svg shows their means.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from user_methods import METHODS, SEEDS, Work, split, write

# A public alphabet, and one sign for everything else.
ALPHABET = "\n !',-.:;?abcdefghijklmnopqrstuvwxyz"
SIGNS, LENGTH = len(ALPHABET) + 1, 64
LEAST = 20  # speeches of a speaker who takes part
WORK = Work(
    group=8, users=40, examples=320, light=50, steps=40, delta=1e-3, epsilons=(4.0, 8.0, 16.0)
)


class Speeches(Dataset):
    """Signs of each speech, padded with -100, and its speaker."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.users = [row["user"] for row in rows]
        self.signs = torch.full((len(rows), LENGTH), -100)
        for number, row in enumerate(rows):
            found = [ALPHABET.find(sign) % SIGNS for sign in row["text"].lower()[:LENGTH]]
            self.signs[number, : len(found)] = torch.tensor(found)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.signs[index]


class NextSign(L.LightningModule):
    """The next sign from the two before; the loss is a mean over speeches of each one's mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.head = nn.Linear(2 * SIGNS, SIGNS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.rate = rate

    def losses(self, signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = F.one_hot(signs.clamp_min(0), SIGNS).float()
        logits = self.head(torch.cat([known[:, :-2], known[:, 1:-1]], -1)).transpose(1, 2)
        each = F.cross_entropy(logits, signs[:, 2:], reduction="none", ignore_index=-100)
        return each.sum(1), (signs[:, 2:] >= 0).sum(1)

    def training_step(self, signs: torch.Tensor, batch_idx: int) -> torch.Tensor:
        total, count = self.losses(signs)
        return (total / count.clamp_min(1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def bits(model: NextSign, test: Speeches) -> float:
    with torch.no_grad():
        total, count = model.losses(test.signs)
    return float(total.sum() / count.sum()) / math.log(2)


def entropy(test: Speeches) -> float:
    """Bits per sign of a model that knows how often each sign occurs, and nothing else."""
    counts = test.signs[:, 2:][test.signs[:, 2:] >= 0].bincount(minlength=SIGNS)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


def trained(data: Speeches, method: str, epsilon: float, seed: int) -> NextSign:
    torch.manual_seed(seed)
    model = NextSign(rate=0.05)
    WORK.fit(model, data, method, epsilon)
    return model


def main(source: str, target: str) -> None:
    with Path(source).open() as file:
        rows = [json.loads(line) for line in file]
    counts = Counter(row["user"] for row in rows)
    rows = [row for row in rows if counts[row["user"]] >= LEAST]
    found = []
    for seed in SEEDS:
        train, held = split(rows, seed)
        data, few, test = Speeches(train), Speeches(WORK.bounded(train, seed)), Speeches(held)
        found.append(("no learning", 0.0, seed, math.log2(SIGNS)))
        found.append(("frequencies", 0.0, seed, entropy(test)))
        plain = bits(trained(data, "without", 0, seed), test)
        found.append(("without privacy", math.inf, seed, plain))
        for epsilon in WORK.epsilons:
            for method in METHODS:
                model = trained(few if method == "group privacy" else data, method, epsilon, seed)
                found.append((method, epsilon, seed, bits(model, test)))
                print(*found[-1], flush=True)
    write(found, Path(target, "speakers.csv"), "bits_per_sign")
    WORK.plot(
        found,
        Path(target, "speakers.svg"),
        {"without privacy": ":", "frequencies": "-.", "no learning": "--"},
        xlabel="ε of a speaker",
        ylabel="bits per sign, other speakers",
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
