"""recipes/llama7b/classify.yaml at user level: is a sentence of a review favourable?

    python tests/benchmarks/reviews_users.py --data REVIEWS.jsonl --out docs/benchmarks

REVIEWS holds rows `{"user": ..., "product": ..., "text": ..., "label": 0, 1 or null}`. The reviews
of every other product are taken as public: a small Llama of whole words learns the task from them
without privacy, in place of a base that was trained on much text. The reviews of the other products
are private. Their reviewers are on one side of the split only, and ε is that of a reviewer with all
sentences. Compared are the base as it is, the recipe itself on that base, and a linear model on
hashed words, which sees the private reviews only. Every result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.cli import main as command
from lightning_privacy.data import ClassificationDataModule, Document, PadOnTheRight
from lightning_privacy.data.base import LabelledDocuments, Split
from lightning_privacy.data.tokenizers import tokenizer_for
from lightning_privacy.models import LlamaQLoRA
from tests.benchmarks.reviews import DELTA, FIELDS, HashedWords, hashed

RECIPE = Path(__file__).parents[2] / "recipes" / "llama7b" / "classify.yaml"
WORDS = 4000
LENGTH = 32
# Sentences of a reviewer that count in a step, reviewers drawn by a step on average, and steps.
GROUP, USERS, STEPS = 8, 64, 40
PUBLIC_EPOCHS = 6
MODEL = {"rank": 2, "alpha": 4.0, "learning_rate": 3e-3, "quantization": "none", "dtype": "float32"}


def plain_trainer(steps: int, callbacks: list[L.Callback] | None = None) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0 if steps else None,
    )


def write_tokenizer(texts: list[str], folder: str) -> None:
    """Whole words of public text, lower case; what is not in it is one and the same token."""
    import tokenizers
    import transformers

    marks = ["<unk>", "<s>", "</s>"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=marks[0]))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=marks)
    model.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token=marks[0], bos_token=marks[1], eos_token=marks[2]
    ).save_pretrained(folder)


def halves(path: str, folder: Path) -> tuple[list[tuple[str, int]], str]:
    """Sentences and labels of the public products, and a file of the private products' rows."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["label"] is not None]
    public = set(sorted({row["product"] for row in rows})[::2])
    private = folder / "private.jsonl"
    lines = [json.dumps(row) for row in rows if row["product"] not in public]
    private.write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = [(row["text"], int(row["label"])) for row in rows if row["product"] in public]
    return known, str(private)


class Base(L.LightningModule):
    """All parameters of a small Llama, trained without privacy."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForSequenceClassification

        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
            num_labels=2, pad_token_id=0, use_cache=False,
        )  # fmt: skip
        self.model = LlamaForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def pretrain(known: list[tuple[str, int]], folder: str) -> None:
    """Write a checkpoint of transformers that has learnt the task from the public reviews."""
    write_tokenizer([text for text, _ in known], folder)
    tokenizer = tokenizer_for(folder)
    rows = LabelledDocuments(
        [Document("public", text, label=label) for text, label in known], tokenizer, LENGTH
    )
    collate = PadOnTheRight(tokenizer.pad_id)
    loader = DataLoader(rows, batch_size=64, shuffle=True, collate_fn=collate)
    base = Base(tokenizer.vocab_size)
    plain_trainer(PUBLIC_EPOCHS * len(loader)).fit(base, loader)
    base.model.save_pretrained(folder)


def linear(split: Split, epsilon: float | None) -> float:
    model, callbacks = HashedWords(learning_rate=0.1), []
    if epsilon is not None:
        users = [document.user for document in split.train]
        callbacks = [
            DifferentialPrivacy(
                epsilon=epsilon, delta=DELTA, clip_norm=0.5, unit="user", users=users,
                group_size=GROUP, expected_batch_size=USERS, journal=False, print_table=False,
            )
        ]  # fmt: skip
    loader = DataLoader(hashed(split.train), batch_size=256, shuffle=True)
    plain_trainer(STEPS, callbacks).fit(model, loader)
    held_out = DataLoader(hashed(split.validation), 4096)
    (shown,) = plain_trainer(0).validate(model, held_out, verbose=False)
    return shown["val_accuracy"]


def llama(data: ClassificationDataModule, base: str, steps: int) -> float:
    """Without privacy: the recipe's module in a plain Trainer."""
    model = LlamaQLoRA(checkpoint=base, task="classification", schedule="linear", **MODEL)
    if steps:
        plain_trainer(steps).fit(model, datamodule=data)
    (shown,) = plain_trainer(0).validate(model, datamodule=data, verbose=False)
    return shown["val_accuracy"]


def recipe(path: str, seed: int, base: str, epsilon: float) -> float:
    """With privacy: what a user would type. The accuracy is that of the last validation."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "seed_everything": seed,
            "data.path": path,
            "data.seed": seed,
            "data.batch_size": 256,
            "data.max_length": LENGTH,
            "data.num_workers": 0,
            "model.checkpoint": base,
            **{f"model.{name}": value for name, value in MODEL.items()},
            "model.gradient_checkpointing": "false",
            "privacy.epsilon": epsilon,
            "privacy.unit": "user",
            "privacy.group_size": GROUP,
            "privacy.expected_batch_size": USERS,
            "privacy.clip_norm": 0.5,
            "trainer.max_steps": STEPS,
            "trainer.val_check_interval": STEPS,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.default_root_dir": folder,
            "trainer.logger.init_args.save_dir": folder,
            "trainer.enable_progress_bar": "false",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        command(["fit", "--config", str(RECIPE), *arguments])
        (log,) = Path(folder).rglob("metrics.csv")
        with log.open() as file:
            shown = [row["val_accuracy"] for row in csv.DictReader(file) if row["val_accuracy"]]
        return float(shown[-1])


def run_seed(settings: argparse.Namespace, path: str, seed: int, base: str, results: Path) -> None:
    data = ClassificationDataModule(
        path, ["0", "1"], user_column="user", val_fraction=0.2, seed=seed, batch_size=256,
        max_length=LENGTH, tokenizer=base,
    )  # fmt: skip
    split = data.split()
    positive = sum(document.label for document in split.validation) / len(split.validation)
    note(results, seed, "base", None, llama(data, base, 0), positive)
    for epsilon in (None, *settings.epsilons):
        L.seed_everything(seed)
        note(results, seed, "linear", epsilon, linear(split, epsilon), positive)
        L.seed_everything(seed)
        got = recipe(path, seed, base, epsilon) if epsilon else llama(data, base, STEPS)
        note(results, seed, "small_llama", epsilon, got, positive)


def note(
    results: Path, seed: int, model: str, epsilon: float | None, got: float, positive: float
) -> None:
    """Write one line, so that a broken run keeps its figures."""
    values = (seed, model, epsilon or "", f"{got:.4f}", f"{max(positive, 1 - positive):.4f}")
    new = not results.exists()
    with results.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(FIELDS)
        writer.writerow(values)
    print(dict(zip(FIELDS, values, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="JSON lines with user, product, text, label")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0, 1.0])
    settings = parser.parse_args()
    warnings.filterwarnings("ignore", ".*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(0)
        known, private = halves(settings.data, Path(folder))
        pretrain(known, folder)
        for seed in settings.seeds:
            run_seed(settings, private, seed, folder, settings.out / "reviews_users.csv")


if __name__ == "__main__":
    main()
