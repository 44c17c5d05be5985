"""recipes/llama7b/classify.yaml at user level: is a sentence of a review favourable?

    python tests/benchmarks/reviews_users.py --data REVIEWS.jsonl --public TEXT.jsonl \
        --out docs/benchmarks

REVIEWS holds rows `{"user": ..., "text": ..., "label": 0, 1 or null}`. Reviewers are on one side
only, and ε is that of a reviewer with all sentences. Two models: a linear one on hashed words, and
the recipe itself on a small Llama of whole words, which is first trained on TEXT without privacy:
vocabulary and weights know nothing else. Without privacy the same module is trained with a plain
Trainer. Every result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.cli import main as command
from lightning_privacy.data import ClassificationDataModule, PadOnTheRight, TextFile
from lightning_privacy.data.base import Split, TokenisedDocuments
from lightning_privacy.data.tokenizers import tokenizer_for
from lightning_privacy.models import CausalLanguageModel, LlamaQLoRA
from tests.benchmarks.reviews import DELTA, FIELDS, HashedWords, hashed

RECIPE = Path(__file__).parents[2] / "recipes" / "llama7b" / "classify.yaml"
WORDS = 4000
LENGTH = 32
# Sentences of a reviewer that count in a step, reviewers drawn by a step on average, and steps.
GROUP, USERS, STEPS = 8, 128, 60
MODEL = {"rank": 2, "alpha": 4.0, "learning_rate": 1e-2, "quantization": "none", "dtype": "float32"}


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


def pretrain(path: str, folder: str, epochs: int) -> None:
    """Write a checkpoint of transformers that knows the public text."""
    documents = TextFile(path, user_column=None).documents()
    write_tokenizer([document.text for document in documents], folder)
    tokenizer = tokenizer_for(folder)
    rows = TokenisedDocuments(documents, tokenizer, LENGTH)
    model = CausalLanguageModel(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, max_length=128,
        learning_rate=4e-3, schedule="cosine",
    )  # fmt: skip
    collate = PadOnTheRight(tokenizer.pad_id)
    loader = DataLoader(rows, batch_size=64, shuffle=True, collate_fn=collate)
    plain_trainer(epochs * len(loader)).fit(model, loader)
    model.language_model.save_pretrained(folder)


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


def llama(data: ClassificationDataModule, base: str) -> float:
    """Without privacy: the recipe's module in a plain Trainer."""
    model = LlamaQLoRA(checkpoint=base, task="classification", schedule="linear", **MODEL)
    plain_trainer(STEPS).fit(model, datamodule=data)
    (shown,) = plain_trainer(0).validate(model, datamodule=data, verbose=False)
    return shown["val_accuracy"]


def recipe(settings: argparse.Namespace, seed: int, base: str, epsilon: float) -> float:
    """With privacy: what a user would type. The accuracy is that of the last validation."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "seed_everything": seed,
            "data.path": settings.data,
            "data.seed": seed,
            "data.batch_size": 128,
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


def run_seed(settings: argparse.Namespace, seed: int, base: str, results: Path) -> None:
    data = ClassificationDataModule(
        settings.data, ["0", "1"], drop_unlabelled=True, user_column="user", val_fraction=0.2,
        seed=seed, batch_size=256, max_length=LENGTH, tokenizer=base,
    )  # fmt: skip
    split = data.split()
    positive = sum(document.label for document in split.validation) / len(split.validation)
    for epsilon in (None, *settings.epsilons):
        L.seed_everything(seed)
        got = linear(split, epsilon)
        note(results, seed, "linear", epsilon, got, positive)
        L.seed_everything(seed)
        got = llama(data, base) if epsilon is None else recipe(settings, seed, base, epsilon)
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
    parser.add_argument("--data", required=True, help="JSON lines with user, text and label")
    parser.add_argument("--public", required=True, help="JSON lines with text, to train on first")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0, 1.0])
    parser.add_argument("--pretraining_epochs", type=int, default=4)
    settings = parser.parse_args()
    warnings.filterwarnings("ignore", ".*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(0)
        pretrain(settings.public, folder, settings.pretraining_epochs)
        for seed in settings.seeds:
            run_seed(settings, seed, folder, settings.out / "reviews_users.csv")


if __name__ == "__main__":
    main()
