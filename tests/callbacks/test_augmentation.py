"""`augmentation_multiplicity`: the mean gradient of an example's views is clipped once."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_privacy import ConfigurationError, DifferentialPrivacy
from lightning_privacy.callbacks import Study, StudyMode

VIEWS, ROWS = 4, 6


class Varied(Dataset):
    """Row i at its n-th visit is a vector of length 1 in direction (i, n): views are orthogonal."""

    def __init__(self) -> None:
        self.visits = [0] * ROWS

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        visit = self.visits[row] % VIEWS
        self.visits[row] += 1
        return nn.functional.one_hot(torch.tensor(row * VIEWS + visit), ROWS * VIEWS).float()


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ROWS * VIEWS))

    def training_step(self, batch, batch_idx):
        return (batch @ self.weight).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def whole(**settings) -> DifferentialPrivacy:
    return DifferentialPrivacy(
        noise_multiplier=1.0,
        delta=1e-3,
        expected_batch_size=ROWS,
        print_table=False,
        independence_check=False,
        **settings,
    )


@pytest.mark.parametrize("batch_size", [3, 8, 24])
def test_the_mean_of_the_views_is_what_is_clipped(batch_size):
    """Four orthogonal gradients of length 1 have a mean of length 1/2, which is clipped to 1/4."""
    callback = whole(clip_norm=0.25, augmentation_multiplicity=VIEWS)
    study = StudyMode(callback, Study(without=("noise",), not_private=True))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[study],
    )  # fmt: skip
    model = Line()
    trainer.fit(model, DataLoader(Varied(), batch_size=batch_size))
    contribution = -model.weight.detach().view(ROWS, VIEWS) * ROWS
    # Row 0 was read once more, to learn where rows lie.
    torch.testing.assert_close(contribution[1:], torch.full((ROWS - 1, VIEWS), 0.125))


def test_users_have_examples_and_no_views():
    with pytest.raises(ConfigurationError, match="unit is an example"):
        whole(augmentation_multiplicity=2, unit="user", group_size=4)
    with pytest.raises(ConfigurationError, match="augmentation_multiplicity"):
        whole(augmentation_multiplicity=0)
