"""Several processes as one private step: what they agree on, and what they add up."""

from __future__ import annotations

from lightning_privacy.distributed.exchange import Departures, Exchange, all_reduced
from lightning_privacy.distributed.shards import Shards
from lightning_privacy.distributed.world import World

__all__ = ["Departures", "Exchange", "Shards", "World", "all_reduced"]
