"""An image classifier on scikit-learn's handwritten digits. Run it with `python digits.py`.

Module and data know nothing of privacy; the trainer gets one callback. 1,347 images to train on and
450 to validate, no network, half a minute on two cores.
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_privacy import DifferentialPrivacy


class DigitClassifier(L.LightningModule):
    """Two convolutions. GroupNorm instead of BatchNorm, which would mix the examples."""

    def __init__(self, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, 10),
        )
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self.network(images)
        self.log("val_loss", F.cross_entropy(scores, labels))
        accuracy = (scores.argmax(dim=1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Digits(L.LightningDataModule):
    """8 x 8 grey images of ten digits."""

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        data = TensorDataset(pixels, torch.tensor(labels))
        seeded = torch.Generator().manual_seed(0)
        self.train, self.validation = random_split(data, [0.75, 0.25], generator=seeded)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=128, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=512)


def main(max_epochs: int = 30) -> L.Trainer:
    """Train; with privacy that is the callback, and nothing else."""
    privacy = DifferentialPrivacy(epsilon=8.0, delta=1e-4, clip_norm=1.0, expected_batch_size=128)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[privacy],
    )
    trainer.fit(DigitClassifier(), Digits())
    print(f"accuracy on held-out images: {trainer.callback_metrics['val_accuracy']:.1%}")
    return trainer


if __name__ == "__main__":
    L.seed_everything(0)  # initial weights; draws and noise do not follow from it
    main()
