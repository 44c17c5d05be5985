"""A module whose layers are written by hand. Run it with `python own_layers.py`.

Nothing here is registered anywhere: the layers use their parameters as tensors, in matrix products,
broadcasts and slices, and the callback covers them as they are. A sequence model learns to find the
largest number. No network, half a minute on two cores.
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import DifferentialPrivacy

LENGTH = 8
WIDTH = 32


class ScaledNorm(nn.Module):
    """Divides by the root mean square, and has a gain of its own and a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.biases = nn.Parameter(torch.zeros(2 * LENGTH, WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        size = inputs.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt()
        return inputs * size * self.gain + self.biases[: inputs.shape[1]]


class SharedAttention(nn.Module):
    """Attention whose queries and keys are the same bare matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.search = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.value = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        queries, keys = inputs @ self.search, inputs.flip(1) @ self.search
        scores = queries @ keys.flip(1).transpose(1, 2) / WIDTH**0.5
        weights = torch.softmax(scores * self.sharpness.exp(), dim=-1)
        return inputs + weights @ (inputs @ self.value)


class FindsTheLargest(L.LightningModule):
    """Says at which position of a sequence the largest number stands."""

    def __init__(self, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.spread = nn.Parameter(torch.randn(1, WIDTH))
        self.layers = nn.Sequential(
            ScaledNorm(), SharedAttention(), ScaledNorm(), SharedAttention(), ScaledNorm()
        )
        self.score = nn.Parameter(torch.randn(WIDTH) / WIDTH**0.5)
        self.learning_rate = learning_rate

    def forward(self, numbers: Tensor) -> Tensor:
        inputs = numbers[..., None] * self.spread + self.places
        return self.layers(inputs) @ self.score

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        numbers, positions = batch
        return F.cross_entropy(self(numbers), positions)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        numbers, positions = batch
        scores = self(numbers)
        self.log("val_loss", F.cross_entropy(scores, positions))
        accuracy = (scores.argmax(dim=1) == positions).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def sequences(count: int, seed: int) -> TensorDataset:
    """Make sequences of random numbers, and the position of each one's largest."""
    numbers = torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(numbers, numbers.argmax(dim=1))


def main(max_epochs: int = 10) -> L.Trainer:
    """Train; with privacy that is the callback, and nothing else."""
    privacy = DifferentialPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0, expected_batch_size=256)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[privacy],
    )
    trainer.fit(
        FindsTheLargest(),
        DataLoader(sequences(8000, seed=1), batch_size=256, shuffle=True),
        DataLoader(sequences(2000, seed=2), batch_size=1000),
    )
    print(f"accuracy on held-out sequences: {trainer.callback_metrics['val_accuracy']:.1%}")
    return trainer


if __name__ == "__main__":
    L.seed_everything(0)  # initial weights; draws and noise do not follow from it
    main()
