"""What leaves a rank leaves in one order, and not before it is complete."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_privacy.distributed import Departures, Exchange

BUNDLES = [("a", "b"), ("c",), ("d", "e")]


def departures(missing: str) -> tuple[Departures, list[str]]:
    sent: list[str] = []
    exchange: Exchange[tuple[str, ...]] = Exchange(lambda names, _: sent.append("".join(names)))

    def made(names: tuple[str, ...]) -> Tensor:
        return torch.ones(len(names))

    return Departures(BUNDLES, made, exchange, missing), sent


def test_a_bundle_waits_for_its_own_and_for_those_before() -> None:
    found, sent = departures("abcd")
    for name, gone in (("c", 0), ("b", 0), ("a", 2), ("d", 3)):
        found.added(name)
        assert len(sent) == gone, name
    found.finish()
    assert sent == ["ab", "c", "de"]


def test_the_order_is_the_same_where_other_names_are_missing() -> None:
    for missing in ("", "e", "de", "zx"):
        found, sent = departures(missing)
        for name in missing:
            found.added(name)
        found.finish()
        assert sent == ["ab", "c", "de"]


def test_at_the_end_nothing_is_missing() -> None:
    found, sent = departures("abcde")
    found.finish()
    assert sent == ["ab", "c", "de"]
