"""The task of recipes/llama7b/classify.yaml on one core: is a sentence of a review favourable?

    python tests/benchmarks/reviews.py --data FILE.jsonl --out docs/benchmarks

FILE holds rows `{"user": ..., "text": ..., "label": 0, 1 or null}`. Users are on one side only; ε
is that of a sentence. Two models, each with and without privacy: a linear one on hashed words, and
a small Llama with LoRA and a head, as in the recipe, first trained on the text of another file
(`--public`), as if that were public.
"""

from __future__ import annotations

import argparse
import csv
import logging
import re
import tempfile
import warnings
import zlib
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.data import ByteTokenizer, ClassificationDataModule, TextFile
from lightning_privacy.data.base import PadOnTheRight, Split, TokenisedDocuments
from lightning_privacy.models import CausalLanguageModel, LlamaQLoRA

DELTA = 1e-5
BATCH = 256
WIDTH = 4096
LENGTH = 128
FIELDS = ("seed", "model", "epsilon", "accuracy", "majority")


class HashedWords(L.LightningModule):
    """A linear classifier of the words of a text, each hashed to one of so many numbers."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)
        nn.init.zeros_(self.linear.weight)
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.linear(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        right = self.linear(batch[0]).argmax(dim=1) == batch[1]
        self.log("val_accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def hashed(documents) -> TensorDataset:
    rows = torch.zeros(len(documents), WIDTH)
    for row, document in zip(rows, documents, strict=True):
        words = re.findall(r"[a-z']+|[!?]", document.text.lower())
        for word in set(words):
            row[zlib.crc32(word.encode()) % WIDTH] += 1
    rows = nn.functional.normalize(rows.sqrt(), dim=1)
    return TensorDataset(rows, torch.tensor([document.label for document in documents]))


def trainer_of(steps: int, epsilon: float | None, clip_norm: float) -> L.Trainer:
    callbacks: list[L.Callback] = []
    if epsilon is not None:
        callbacks.append(
            DifferentialPrivacy(
                epsilon=epsilon,
                delta=DELTA,
                clip_norm=clip_norm,
                expected_batch_size=BATCH,
                journal=False,
                print_table=False,
            )
        )
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if not steps else 0,
        callbacks=callbacks,
    )


def linear(split: Split, epsilon: float | None) -> float:
    train, held_out = hashed(split.train), hashed(split.validation)
    model = HashedWords(learning_rate=0.1)
    steps = 60
    loader = DataLoader(train, batch_size=BATCH, shuffle=True)
    trainer_of(steps, epsilon, 0.5).fit(model, loader)
    shown = trainer_of(0, None, 1.0).validate(model, DataLoader(held_out, 4096), verbose=False)
    return shown[0]["val_accuracy"]


def small_llama(data: ClassificationDataModule, base: str, epsilon: float | None) -> float:
    model = LlamaQLoRA(
        checkpoint=base,
        task="classification",
        quantization="none",
        dtype="float32",
        rank=8,
        alpha=16.0,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        schedule="linear",
    )
    trainer = trainer_of(60, epsilon, 0.5)
    if epsilon is None:
        data.batch_size = BATCH
    trainer.fit(model, datamodule=data)
    return trainer_of(0, None, 1.0).validate(model, datamodule=data, verbose=False)[0][
        "val_accuracy"
    ]


def pretrain(path: str, folder: str) -> None:
    documents = TextFile(path, user_column=None).documents()
    rows = TokenisedDocuments(documents, ByteTokenizer(), LENGTH)
    model = CausalLanguageModel(
        hidden_size=64, num_layers=2, max_length=LENGTH, learning_rate=4e-3, schedule="cosine"
    )
    loader = DataLoader(
        rows, batch_size=64, shuffle=True, collate_fn=PadOnTheRight(ByteTokenizer.pad_id)
    )
    trainer_of(2 * len(rows) // 64, None, 1.0).fit(model, loader)
    model.language_model.save_pretrained(folder)


def run_seed(seed: int, settings: argparse.Namespace, base: str | None, results: Path) -> None:
    for epsilon in (None, 8.0, 3.0, 1.0):
        for name in ("linear", "small_llama"):
            # The Llama takes minutes: with and without privacy, on the first seed.
            if name == "small_llama" and (base is None or seed or epsilon not in {None, 8.0}):
                continue
            L.seed_everything(seed)
            data = ClassificationDataModule(
                settings.data,
                ["0", "1"],
                drop_unlabelled=True,
                user_column="user",
                val_fraction=0.2,
                seed=seed,
                batch_size=64,
                max_length=LENGTH,
                tokenizer="byte",
            )
            split = data.split()
            positive = sum(document.label for document in split.validation)
            majority = max(positive, len(split.validation) - positive) / len(split.validation)
            got = linear(split, epsilon) if name == "linear" else small_llama(data, base, epsilon)
            note(results, seed, name, epsilon or "", f"{got:.4f}", f"{majority:.4f}")


def note(results: Path, *values: object) -> None:
    new = not results.exists()
    with results.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(FIELDS)
        writer.writerow(values)
    print(dict(zip(FIELDS, values, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="JSON lines with user, text and label")
    parser.add_argument("--public", help="JSON lines with text, to train the small Llama on first")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    settings = parser.parse_args()
    warnings.filterwarnings("ignore", ".*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(0)
        if settings.public:
            pretrain(settings.public, folder)
        for seed in settings.seeds:
            base = folder if settings.public else None
            run_seed(seed, settings, base, settings.out / "reviews.csv")


if __name__ == "__main__":
    main()
