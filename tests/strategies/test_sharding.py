"""How a module is sharded: what torch cannot do is refused; the rest is in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_privacy.errors import UnsupportedOperationError
from lightning_privacy.strategies import sharding

NO_BYTES = "only Tensors of floating point dtype can require gradients"


@pytest.mark.parametrize("packed", [True, False])
def test_a_torch_that_cannot_shard_bytes(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(NO_BYTES)

    monkeypatch.setattr(sharding, "fully_shard", refuse)
    monkeypatch.setattr(
        sharding, "pack_quantised", lambda *_: set(module.parameters()) if packed else set()
    )
    kind = UnsupportedOperationError if packed else RuntimeError
    with pytest.raises(kind, match=NO_BYTES) as raised:
        sharding.shard(module, SimpleNamespace(device_type="cpu"))
    assert packed == ("torch 2.13 or later" in str(raised.value))


def test_another_error_keeps_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(2, 2))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sharding, "fully_shard", refuse)
    monkeypatch.setattr(sharding, "pack_quantised", lambda *_: set(module.parameters()))
    with pytest.raises(RuntimeError, match="^out of memory$"):
        sharding.shard(module, SimpleNamespace(device_type="cpu"))
