"""Does private fine-tuning learn? LoRA on a small Llama under several ε, and without privacy.

A small Llama is trained without privacy on one half of a text's speakers, as if it were public.
Then it is fine-tuned with LoRA on the other half's training speakers, without privacy and under ε,
and compared on speakers that neither training saw. An example is a piece of at most 94 bytes of a
speech; in the second half the speaker's name stands before it, in capitals as in a printed play, a
form that the base has not seen.

    python tests/benchmarks/usefulness.py --data FILE.jsonl --out docs/benchmarks

FILE holds rows `{"user": ..., "text": ...}`. One core, about ten minutes per seed. Every result is
written as soon as it is there; `--draw` makes table and plot of what is.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.data import ByteTokenizer, Document, PadOnTheRight, TextFile
from lightning_privacy.data.base import TokenisedDocuments
from lightning_privacy.models import CausalLanguageModel, LlamaQLoRA

PIECE = 94  # bytes of an example, and the marks of its begin and end
LENGTH = PIECE + 2
BATCH = 64
DELTA = 1e-4
EPSILONS = (8.0, 3.0, 1.0)
FIELDS = ("seed", "run", "epsilon", "validation_loss", "steps", "training_examples", "seconds")
NAMES = {"none": "no fine-tuning", "plain": "without privacy"}


def share_of(name: str, seed: int) -> float:
    """A number in [0, 1) that follows from a speaker's name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(path: str, seed: int) -> tuple[list[Document], list[Document], list[Document]]:
    """Examples of the public half, to fine-tune on, and to validate on; no speaker is in two."""
    parts: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    for document in TextFile(path).documents():
        share, text = share_of(document.user, seed), document.text
        number = 0 if share < 0.5 else 1 if share < 0.9 else 2
        name = f"{document.user.upper()}:\n" if number else ""
        room = PIECE - len(name)
        pieces = (text[i : i + room] for i in range(0, len(text), room))
        parts[number].extend(Document(document.user, name + piece) for piece in pieces)
    return parts


def loader(documents: list[Document], *, shuffle: bool) -> DataLoader:
    rows = TokenisedDocuments(documents, ByteTokenizer(), LENGTH)
    collate = PadOnTheRight(ByteTokenizer.pad_id)
    return DataLoader(rows, batch_size=BATCH, shuffle=shuffle, collate_fn=collate)


def trainer_of(steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )


def validation_loss(model: L.LightningModule, documents: list[Document]) -> float:
    trainer = trainer_of(0, [])
    losses = trainer.predict(model, loader(documents, shuffle=False))
    return torch.cat(losses).mean().item()


def pretrain(documents: list[Document], settings: argparse.Namespace, folder: str) -> None:
    """Train the base without privacy, and write it as a checkpoint of transformers."""
    steps = settings.pretraining_epochs * len(documents) // BATCH
    model = CausalLanguageModel(
        hidden_size=settings.hidden_size,
        num_layers=2,
        max_length=LENGTH,
        learning_rate=4e-3,
        schedule="cosine",
        warmup_steps=20,
    )
    trainer_of(steps, []).fit(model, loader(documents, shuffle=True))
    model.language_model.save_pretrained(folder)


def fine_tune(
    folder: str, documents: list[Document], settings: argparse.Namespace, epsilon: float | None
) -> tuple[L.LightningModule, int]:
    """Train adapters on the base, with ε or without; as many steps on as many examples."""
    steps = settings.steps
    # Each has the rate that was best on one seed: without noise that is a smaller one.
    rate = settings.learning_rate if epsilon else settings.plain_learning_rate
    model = LlamaQLoRA(
        checkpoint=folder,
        quantization="none",
        dtype="float32",
        rank=settings.rank,
        alpha=2 * settings.rank,
        gradient_checkpointing=False,
        learning_rate=rate,
        schedule="linear",
    )
    train = loader(documents, shuffle=True)
    if epsilon is None:
        collate = PadOnTheRight(ByteTokenizer.pad_id)
        size = settings.expected_batch_size
        train = DataLoader(train.dataset, batch_size=size, shuffle=True, collate_fn=collate)
        trainer_of(steps, []).fit(model, train)
        return model, steps
    privacy = DifferentialPrivacy(
        epsilon=epsilon,
        delta=DELTA,
        clip_norm=settings.clip_norm,
        expected_batch_size=settings.expected_batch_size,
        journal=False,
        print_table=False,
    )
    trainer_of(steps, [privacy]).fit(model, train)
    assert privacy.epsilon() <= epsilon
    return model, privacy.steps


def run_seed(seed: int, settings: argparse.Namespace, results: Path) -> None:
    L.seed_everything(seed)  # initial weights and the split; draws and noise do not follow from it
    public, train, held_out = split(settings.data, seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        pretrain(public, settings, folder)
        base = LlamaQLoRA(checkpoint=folder, quantization="none", dtype="float32")
        base.configure_model()
        note(results, seed, "none", "", validation_loss(base, held_out), 0, len(train), start)
        runs = [("plain", None), *((f"private_{e:g}", e) for e in settings.epsilons)]
        for name, epsilon in runs:
            L.seed_everything(seed)
            start = time.perf_counter()
            model, steps = fine_tune(folder, train, settings, epsilon)
            loss = validation_loss(model, held_out)
            note(results, seed, name, epsilon or "", loss, steps, len(train), start)


def note(results: Path, *values: object) -> None:
    """Write one line, so that a broken run keeps its figures."""
    *values, start = values
    line = [*values, round(time.perf_counter() - start)]
    line[3] = f"{line[3]:.4f}"
    new = not results.exists()
    with results.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(FIELDS)
        writer.writerow(line)
    print(dict(zip(FIELDS, line, strict=True)), flush=True)


def summary(results: Path) -> dict[str, list[float]]:
    """Validation losses by run, over the seeds."""
    losses: dict[str, list[float]] = {}
    with results.open() as file:
        for row in csv.DictReader(file):
            losses.setdefault(row["run"], []).append(float(row["validation_loss"]))
    return losses


def draw(out: Path) -> None:
    """Make the table and the plot of what was measured."""
    import matplotlib.pyplot as plt

    losses = summary(out / "usefulness.csv")
    order = ["none", "private_1", "private_3", "private_8", "plain"]
    order = [name for name in order if name in losses]
    labels = [NAMES.get(name, f"ε = {name.rpartition('_')[2]}") for name in order]
    print("| fine-tuning | mean validation loss, nats per byte | of the seeds |\n|---|---|---|")
    for name, label in zip(order, labels, strict=True):
        each = ", ".join(f"{loss:.4f}" for loss in losses[name])
        print(f"| {label} | {statistics.mean(losses[name]):.4f} | {each} |")
    # Without fine-tuning the loss is so much higher that the others could not be told apart.
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.6), layout="constrained")
    for panel, shown in zip(axes, (order, order[1:]), strict=True):
        for name in shown:
            place = order.index(name)
            panel.plot([place] * len(losses[name]), losses[name], "o", color="tab:blue", alpha=0.5)
            mean = statistics.mean(losses[name])
            panel.hlines(mean, place - 0.3, place + 0.3, color="tab:blue")
        lines = [label if "ε" in label else label.replace(" ", "\n") for label in labels]
        panel.set_xticks(range(len(order)), lines, fontsize=9)
        panel.set_xlim(order.index(shown[0]) - 0.6, len(order) - 0.4)
        panel.set_ylabel("validation loss (nats per byte)")
        panel.grid(axis="y", alpha=0.3)
    axes[1].set_title("the same, fine-tuned models only", fontsize=10)
    axes[0].set_title("a point is a seed, a bar their mean", fontsize=10)
    figure.savefig(out / "usefulness.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="JSON lines with the columns user and text")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="*", default=list(EPSILONS))
    parser.add_argument("--pretraining_epochs", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--expected_batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-2)
    parser.add_argument("--plain_learning_rate", type=float, default=1e-2)
    parser.add_argument("--clip_norm", type=float, default=0.3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--draw", action="store_true", help="only table and plot")
    settings = parser.parse_args()
    warnings.filterwarnings("ignore", ".*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings.out.mkdir(parents=True, exist_ok=True)
    if not settings.draw:
        for seed in settings.seeds:
            run_seed(seed, settings, settings.out / "usefulness.csv")
    draw(settings.out)


if __name__ == "__main__":
    main()
