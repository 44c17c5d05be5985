"""A fit starts from the weights of a private run, of the same encoders and decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models import PrivacyPreserveNet, SmallDecoder
from lightning_privacy.models._trained import start_from

pytest.importorskip("transformers")

HEADS = ("network.score", "network.lm_head")


def net(task: str = "classification", width: int = 16) -> PrivacyPreserveNet:
    decoder = SmallDecoder(hidden_size=width, num_layers=1, num_heads=2, num_key_value_heads=1)
    return PrivacyPreserveNet(task=task, decoder=decoder)


def saved(path, model, **more) -> str:
    torch.save({"state_dict": model.state_dict(), **more}, path)
    return str(path)


def test_everything_but_the_head_is_taken_up(tmp_path):
    before, model = net("causal_lm"), net()
    head = model.network.score.weight.detach().clone()
    start_from(model, saved(tmp_path / "a.ckpt", before), HEADS)
    given, own = before.state_dict(), model.state_dict()
    assert torch.equal(own["network.score.weight"], head)
    shared = own.keys() & given.keys()
    assert shared == own.keys() - {"network.score.weight"}
    assert all(torch.equal(own[name], given[name]) for name in shared)


def test_what_was_trained_in_study_mode_is_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", net(), not_private="study mode, without noise")
    with pytest.raises(ConfigurationError, match="without noise"):
        start_from(net(), path, HEADS)


def test_another_model_and_no_file_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="differ"):
        start_from(net(), saved(tmp_path / "a.ckpt", net(width=32)), HEADS)
    with pytest.raises(ConfigurationError, match="No file"):
        start_from(net(), str(tmp_path / "none.ckpt"), HEADS)


class Payload:
    """What a file may hold that is read without care."""

    def __reduce__(self):
        return Path.touch, (Path(self.__dict__["path"]),)


def test_reading_a_checkpoint_runs_no_code(tmp_path):
    payload = Payload()
    payload.path = tmp_path / "ran"
    path = saved(tmp_path / "a.ckpt", net(), more=payload)
    with pytest.raises(ConfigurationError, match="run code"):
        start_from(net(), path, HEADS)
    assert not payload.path.exists()
