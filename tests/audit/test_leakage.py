"""All attacks on a finished model at once."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import ConfigurationError, UnsupportedOperationError
from lightning_privacy.audit import measure_leakage, membership_figures, secret_figures


class Data(pl.LightningDataModule):
    """Labels that follow from nothing: they can only be memorised."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.sides = [
            TensorDataset(*(torch.randn(40, n, generator=generator) for n in (6, 1)))
            for _ in range(2)
        ]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sides[0], batch_size=16)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sides[1], batch_size=16)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))

    def losses(self, batch: Any) -> Tensor:
        assert not self.training
        return (self.net(batch[0]) - batch[1]).square().mean(1)


def memorized(model: Model, data: Data) -> Model:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = data.sides[0].tensors
    for _ in range(200):
        optimizer.zero_grad()
        (model.net(x) - y).square().mean().backward()
        optimizer.step()
    return model


def test_a_model_of_any_kind_is_attacked_by_its_losses() -> None:
    data, before = Data(), Model()
    model = memorized(copy.deepcopy(before), data)
    found = {f.attack: f for f in measure_leakage(model, data, reference=before).membership}
    assert found.keys() == {"loss", "ratio"}
    assert min(f.auroc for f in found.values()) > 0.65
    assert found["loss"].lower <= found["loss"].advantage <= found["loss"].upper
    (alone,) = measure_leakage(model, data, reference=None, rows=20).membership
    assert alone.attack == "loss"
    assert model.training
    (untrained,) = measure_leakage(before, data, reference="adapters").membership
    assert abs(untrained.auroc - 0.5) < 0.2


def test_an_attack_on_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`rows` = 0"):
        measure_leakage(Model(), Data(), reference=None, rows=0)


def test_a_module_without_losses_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match="losses"):
        measure_leakage(nn.Linear(6, 1), Data())


def test_known_secrets_are_measured() -> None:
    pytest.importorskip("transformers")
    from lightning_privacy.data import SecretsCorpus, SyntheticSecrets, TextCorpus
    from lightning_privacy.models import CausalLanguageModel

    # Six members' fresh texts show little of an unlucky model: 0.53 for users was seen once.
    torch.manual_seed(0)
    corpus = SecretsCorpus(n_users=16, docs_per_user=1, digits=1)
    data = SyntheticSecrets(corpus, batch_size=16)
    model = CausalLanguageModel(hidden_size=16, num_layers=1, num_heads=2, learning_rate=0.03)
    before = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    (batch,) = data.train_dataloader()
    for _ in range(120):
        optimizer.zero_grad()
        model.losses(batch).mean().backward()
        optimizer.step()
    found = measure_leakage(model, data, reference=before)
    assert found.secrets is not None
    assert found.secrets.inside > found.secrets.outside + 0.5
    assert found.secrets.largest == pytest.approx(3.32, abs=0.01)
    assert found.secrets.extracted > 0.5
    assert {f.attack for f in found.membership} >= {"loss", "ratio", "min_k", "min_k_plus_plus"}
    assert found.blind is not None
    assert found.users is not None
    assert found.users.fresh
    assert found.users.figures.auroc > 0.7
    assert len(found.users.scores) == 16
    assert secret_figures(model, TextCorpus(embedded=corpus)) == found.secrets
    assert secret_figures(model, Data()) is None


def test_figures_are_those_of_the_metrics() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    found = membership_figures("x", scores, scores >= 4)
    assert found.auroc == found.tpr == 1.0
    assert found.as_dict().keys() == {"AUROC", "TPR at 1 % FPR", "advantage", "from", "to"}
