"""User-level privacy of a language model: who speaks in Shakespeare, and what do they say?

    python docs/benchmarks/speakers.py shakespeare_users.jsonl docs/benchmarks

The data are the speeches of Tiny Shakespeare, one JSON object a line with `user` and `text`.
Speakers with at least 20 speeches take part; four fifths are trained on, the others are the test.
Every row of speakers.csv is one seed; speakers.svg shows their means.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import warnings
from collections import Counter
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

# A public alphabet, and one sign for everything else.
ALPHABET = "\n !',-.:;?abcdefghijklmnopqrstuvwxyz"
SIGNS, LENGTH = len(ALPHABET) + 1, 64
LEAST, GROUP, STEPS, DELTA = 20, 8, 40, 1e-3
EPSILONS, SEEDS = (4.0, 8.0, 16.0), (0, 1, 2)
USERS, EXAMPLES = 40, 320  # drawn by a step, on average


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


def split(rows: list[dict[str, str]], seed: int) -> tuple[list, list]:
    names = sorted({row["user"] for row in rows})
    order = np.random.default_rng(seed).permutation(len(names))
    held = {names[number] for number in order[: len(names) // 5]}
    return [r for r in rows if r["user"] not in held], [r for r in rows if r["user"] in held]


def settings(method: str, epsilon: float) -> dict[str, Any]:
    """What distinguishes the methods; all protect a speaker with the same (ε, δ)."""
    users = {"unit": "user", "group_size": GROUP, "expected_batch_size": USERS, "epsilon": epsilon}
    if method == "users":
        return users
    if method == "examples":
        return {**users, "user_sampling": "examples", "expected_batch_size": EXAMPLES}
    if method == "tiers":
        # Who speaks often has half the ε; only the larger one is published.
        policy = TierPolicy(
            segmentation=VolumeTiers({"light": 50, "heavy": 1000}),
            targets={"light": epsilon, "heavy": epsilon / 2},
            shares={"light": 0.5, "heavy": 0.5},
        )
        return {**users, "tiers": policy}
    # Group privacy: (ε, δ) for GROUP examples from (ε', δ') for one.
    own = epsilon / GROUP
    ratio = math.expm1(epsilon) / math.expm1(own)
    return {"epsilon": own, "delta": DELTA / ratio, "expected_batch_size": EXAMPLES}


def trained(data: Speeches, method: str, epsilon: float, seed: int) -> NextSign:
    torch.manual_seed(seed)
    model = NextSign(rate=0.05)
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


def bounded(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """At most GROUP speeches of each speaker, as group privacy needs."""
    kept = UserIndex([row["user"] for row in rows]).bounded(GROUP, seed.to_bytes(16, "big"))
    return [rows[row] for row in kept.tolist()]


def main(source: str, target: str) -> None:
    with Path(source).open() as file:
        rows = [json.loads(line) for line in file]
    counts = Counter(row["user"] for row in rows)
    rows = [row for row in rows if counts[row["user"]] >= LEAST]
    found = []
    for seed in SEEDS:
        train, held = split(rows, seed)
        data, few, test = Speeches(train), Speeches(bounded(train, seed)), Speeches(held)
        found.append(("no learning", 0.0, seed, math.log2(SIGNS)))
        found.append(("frequencies", 0.0, seed, entropy(test)))
        plain = bits(trained(data, "without", 0, seed), test)
        found.append(("without privacy", math.inf, seed, plain))
        for epsilon in EPSILONS:
            for method in ("users", "examples", "tiers", "group privacy"):
                model = trained(few if method == "group privacy" else data, method, epsilon, seed)
                found.append((method, epsilon, seed, bits(model, test)))
                print(*found[-1], flush=True)
    with Path(target, "speakers.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "epsilon", "seed", "bits_per_sign"])
        table.writerows((m, f"{e:g}", s, f"{b:.4f}") for m, e, s, b in found)
    plot(found, Path(target, "speakers.svg"))


def plot(found: list[tuple[str, float, int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method in ("users", "tiers", "examples", "group privacy"):
        means = [np.mean([b for m, e, _, b in found if (m, e) == (method, x)]) for x in EPSILONS]
        axes.plot(EPSILONS, means, marker="o", label=method)
    for method, style in (
        ("without privacy", ":"),
        ("frequencies", "-."),
        ("no learning", "--"),
    ):
        mean = np.mean([b for m, _, _, b in found if m == method])
        axes.axhline(mean, linestyle=style, color="grey", label=method)
    axes.set(xscale="log", xlabel="ε of a speaker", ylabel="bits per sign, other speakers")
    axes.set_xticks(EPSILONS, [f"{x:g}" for x in EPSILONS])
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
