"""How batch size, clip norm, learning rate and number of steps act under a fixed ε.

    python tests/benchmarks/tuning.py --out docs/benchmarks

Trains a small Llama on the embedded corpus many times, at ε = 3: no file is needed, one core, about
ten minutes. Every result is written as soon as it is there; `--draw` makes the plots of what is.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.data import SecretsCorpus, SyntheticSecrets
from lightning_privacy.models import CausalLanguageModel

EPSILON, DELTA = 3.0, 1e-5
RATES = (1e-2, 3e-2, 1e-1)
BATCHES = (16, 64, 256)
CLIPS = (0.01, 0.1, 1.0, 10.0)
STEPS = (20, 60, 180, 540)
FIELDS = (
    "sweep",
    "expected_batch_size",
    "clip_norm",
    "learning_rate",
    "steps",
    "noise_multiplier",
    "clipped_share",
    "validation_loss",
)
Row = dict[str, float | str]


def runs() -> Iterator[tuple[str, int, float, float, int]]:
    """Every run: its sweep, logical batch, clip norm, learning rate and steps."""
    for clip in CLIPS:
        for rate in (3e-3, 1e-2, 3e-2):
            yield "clip", 256, clip, rate, 36
    for batch in BATCHES:
        for rate in RATES:
            yield "batch", batch, 1.0, rate, 60
    for steps in STEPS:
        for rate in RATES:
            yield "steps", 64, 1.0, rate, steps


def train(
    data: SyntheticSecrets, sweep: str, batch: int, clip: float, rate: float, steps: int
) -> Row:
    L.seed_everything(0)
    model = CausalLanguageModel(
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_key_value_heads=1,
        max_length=64,
        learning_rate=rate,
        schedule="linear",
    )
    privacy = DifferentialPrivacy(
        epsilon=EPSILON,
        delta=DELTA,
        clip_norm=clip,
        expected_batch_size=batch,
        independence_check=False,
        journal=False,
        print_table=False,
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[privacy],
    )
    trainer.fit(model, datamodule=data)
    assert privacy.epsilon() <= EPSILON
    summary = privacy.summary()
    trainer.limit_val_batches = 1.0
    tested = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loss = tested.validate(model, datamodule=data, verbose=False)[0]["val_loss"]
    noise, clipped = summary.plan.noise_multiplier, summary.clipped_share or 0.0
    values = (sweep, batch, clip, rate, steps, round(noise, 4), round(clipped, 4), round(loss, 4))
    return dict(zip(FIELDS, values, strict=True))


def measure(path: Path) -> None:
    data = SyntheticSecrets(SecretsCorpus(n_users=1500), batch_size=64, max_length=64)
    done = [tuple(row[name] for name in FIELDS[:5]) for row in read(path)] if path.exists() else []
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for run in runs():
            if run not in done:
                row = train(data, *run)
                writer.writerow(row)
                file.flush()
                print(row, flush=True)


def read(path: Path) -> list[Row]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    whole = {"expected_batch_size", "steps"}
    return [
        {k: v if k == "sweep" else int(v) if k in whole else float(v) for k, v in row.items()}
        for row in rows
    ]


def lines(axes, rows: list[Row], across: str, by: str, label: str) -> None:
    """One line per value of ``by``, over ``across``."""
    import matplotlib.pyplot as plt

    values = sorted({row[by] for row in rows})
    for number, value in enumerate(values):
        own = sorted((row for row in rows if row[by] == value), key=lambda row: row[across])
        color = plt.get_cmap("viridis")(number / max(1, len(values) - 1) * 0.9)
        places, losses = ([row[name] for row in own] for name in (across, "validation_loss"))
        axes.plot(places, losses, "o-", color=color, label=label.format(value), markersize=4)
    ticks(axes, [row[across] for row in rows])
    axes.set_ylabel("validation loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def ticks(axes, values: list[float]) -> None:
    """A logarithmic axis with a tick at each value."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axes.minorticks_off()


def draw(out: Path) -> None:
    import matplotlib.pyplot as plt

    rows = read(out / "tuning.csv")
    ordinary = {sweep: [row for row in rows if row["sweep"] == sweep] for sweep in
                ("batch", "clip", "steps")}  # fmt: skip

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    lines(left, ordinary["batch"], "expected_batch_size", "learning_rate", "learning rate {:g}")
    left.set_xlabel("expected batch size, 60 private steps")
    noise = {
        row["expected_batch_size"]: row["noise_multiplier"] / row["expected_batch_size"]
        for row in ordinary["batch"]
    }
    right.plot(list(noise), list(noise.values()), "o-")
    right.set(ylim=(0, None), xlabel="expected batch size")
    right.set_ylabel("noise in the mean gradient, σ / B")
    ticks(right, list(noise))
    right.grid(alpha=0.3)
    save(figure, out / "tuning_batch")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    lines(left, ordinary["clip"], "clip_norm", "learning_rate", "learning rate {:g}")
    left.set_xlabel("clip norm")
    shares = {row["clip_norm"]: row["clipped_share"] for row in ordinary["clip"]}
    right.plot(list(shares), [100 * share for share in shares.values()], "o-")
    right.set(xlabel="clip norm", ylabel="gradients that were clipped (%)")
    ticks(right, list(shares))
    right.grid(alpha=0.3)
    save(figure, out / "tuning_clip")

    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    lines(axes, ordinary["steps"], "steps", "learning_rate", "learning rate {:g}")
    axes.set_xlabel("private steps of 64 examples, at the same ε")
    save(figure, out / "tuning_steps")


def save(figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--draw", action="store_true", help="only the plots")
    settings = parser.parse_args()
    warnings.filterwarnings("ignore", ".*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings.out.mkdir(parents=True, exist_ok=True)
    if not settings.draw:
        measure(settings.out / "tuning.csv")
    draw(settings.out)


if __name__ == "__main__":
    main()
