"""Two commands pretrain and fine-tune one model privately, and a ledger adds their ε up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_privacy import PrivacyLedger
from lightning_privacy.cli import main

for package in ("transformers", "librosa"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
SMALL = [
    "--data.batch_size=16",
    "--data.corpus.n_users=16",
    "--data.corpus.test_examples=4",
    "--model.decoder.hidden_size=16",
    "--model.decoder.num_layers=1",
    "--privacy.expected_batch_size=16",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu",
]


def fit(name: str, *more: str) -> int:
    path = ROOT / "recipes" / "multimodal" / f"{name}.yaml"
    return main(["fit", "--config", str(path), *SMALL, *more])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pretraining_and_fine_tuning_share_one_budget(folder, capsys):
    assert fit("finetune") == 2
    assert "No file 'runs/pretrained/last.ckpt'" in capsys.readouterr().err
    assert fit("pretrain") == 0
    ledger = PrivacyLedger("multimodal.sqlite", dataset="glyphs")
    first = ledger.epsilon()
    assert 0 < first <= 4.01
    held = torch.load("runs/pretrained/last.ckpt", weights_only=False)
    assert not any("score" in name for name in held["state_dict"])
    assert fit("finetune") == 0
    assert first < ledger.epsilon() <= 8.0
    assert [entry.settled for entry in ledger.entries()] == [True, True]
    # Nothing is left for a third run of that size, and a study would cost everything.
    assert fit("finetune", "--privacy.epsilon=8") == 1
    assert fit("finetune", "--study.without=[noise]", "--study.not_private=true") == 1
    assert "stay within" in capsys.readouterr().err
    assert len(ledger.entries()) == 2
