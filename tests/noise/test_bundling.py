"""Bundles: every parameter once, small ones apart and last."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_privacy.noise import bundles

SHAPES = {"head": (2**23 + 1,), "norm": (64,), "table": (2**11, 2**12), "bias": (2**20,)}


def on(device: str, **more: tuple[int, ...]) -> dict[str, nn.Parameter]:
    shapes = {**SHAPES, **more}
    return {name: nn.Parameter(torch.empty(shapes[name], device=device)) for name in shapes}


def test_on_a_gpu_large_ones_lie_together_up_to_a_limit() -> None:
    # "meta" has no memory, and is no CPU.
    more = {f"more{number}": (2**23,) for number in range(7)}
    found = bundles(on("meta", **more))
    assert found == [("head",), ("table", *[*more][:6]), ("more6",), ("norm", "bias")]


def test_on_the_cpu_only_small_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_privacy.noise.bundling._SMALL_ON_CPU", 100)
    parameters = {name: nn.Parameter(torch.ones(size)) for name, size in
                  {"a": 101, "b": 100, "c": 200, "d": 3}.items()}  # fmt: skip
    assert bundles(parameters) == [("a",), ("c",), ("b", "d")]


def test_types_do_not_mix() -> None:
    parameters = {
        "a": nn.Parameter(torch.ones(2)),
        "b": nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "c": nn.Parameter(torch.ones(2)),
    }
    assert bundles(parameters) == [("a", "c"), ("b",)]
