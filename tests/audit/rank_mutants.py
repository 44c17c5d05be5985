"""Trainers that are broken where several ranks work together; patches to the shipped source.

Every rank applies the patch to itself, so they are looked up by name in the processes that train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lightning_privacy import DifferentialPrivacy
from lightning_privacy import step as step_module
from lightning_privacy.audit import verify_trainer
from lightning_privacy.callbacks import _ranks, _state
from lightning_privacy.clipping.norms import FlatClipping
from lightning_privacy.distributed import Exchange, World
from lightning_privacy.noise import fresh_secret
from lightning_privacy.sampling import ShardedSampler, micro_batches, shards
from lightning_privacy.step import PrivateStep
from lightning_privacy.strategies import run as run_module
from tests.audit.mutants import Audited, Mutant, mutant, patched

RANK_MUTANTS: dict[str, Mutant] = {}
TWO: dict[str, Any] = {"devices": 2, "strategy": "private_ddp"}


def broken(area: str, sign: str, **options: Any) -> Any:
    return mutant(area, sign, into=RANK_MUTANTS, **options)


def result_of(name: str | None, options: dict[str, Any]) -> tuple[bool, list[str], int, str]:
    """One audit, run by every rank: whether it passed, what failed, number of checks, all of it."""
    if name is None:
        audit = verify_trainer(DifferentialPrivacy, **{**TWO, **options})
    else:
        with RANK_MUTANTS[name].broken() as audited:
            options = {**TWO, **RANK_MUTANTS[name].options, **options}
            audit = verify_trainer(audited, stop_at_failure=True, **options)
    reasons = [*(check.name for check in audit.failures), *([audit.error] if audit.error else [])]
    return audit.passed, reasons, len(audit.checks), str(audit)


def fresh_number() -> int:
    return int.from_bytes(fresh_secret()[:4], "little")


def unnoticed() -> Any:
    """Without the trainer's own look at its replicas, which refuses ranks that step apart."""
    return patched(run_module, "require_same", lambda *_arguments: None)


# ---------------------------------------------------------------------- noise
@broken("noise", "accounted size")
def only_rank_0_adds_its_share_of_the_noise() -> Iterator[Audited]:
    share = property(lambda self: 0.0 if self.rank else 1 / math.sqrt(self.size))
    with patched(World, "noise_share", share) as audited:
        yield audited


@broken("noise", "accounted size")
def every_rank_adds_the_whole_noise() -> Iterator[Audited]:
    with patched(World, "noise_share", property(lambda _self: 1.0)) as audited:
        yield audited


@broken("noise", "accounted size")
def the_variance_is_divided_twice() -> Iterator[Audited]:
    with patched(World, "noise_share", property(lambda self: 1 / self.size)) as audited:
        yield audited


@broken("noise", "accounted size")
def all_ranks_draw_the_same_noise() -> Iterator[Audited]:
    ordinary = _ranks.secrets_of

    def secrets_of(*arguments: Any) -> tuple[bytes, bytes]:
        draws, _ = ordinary(*arguments)
        return draws, draws

    with patched(_ranks, "secrets_of", secrets_of) as audited:
        yield audited


@broken("noise", "same release")
def every_rank_adds_noise_after_the_sum() -> Iterator[Audited]:
    ordinary = PrivateStep._hand_over

    def hand_over(self: PrivateStep, names: Any, total: Any) -> None:
        noise = torch.randn(total.shape, generator=torch.Generator().manual_seed(fresh_number()))
        ordinary(self, names, total + self.noise_std * self._share * noise)

    with patched(PrivateStep, "_hand_over", hand_over) as audited, unnoticed():
        yield audited


# ---------------------------------------------------------------------- sums
def summing(change: Any) -> Any:
    """Change how ranks add up; `change` gets the world and one rank's tensor, in place."""

    def exchange(self: World, arrived: Any) -> Any:
        return Exchange(lambda key, tensor: arrived(key, change(self, tensor)))

    return patched(World, "exchange", exchange)


@broken("clipping", "same release")
def the_sums_of_the_ranks_are_not_added_up() -> Iterator[Audited]:
    with summing(lambda _world, tensor: tensor) as audited, unnoticed():
        yield audited


@broken("normalising", "accounted size")
def the_mean_over_ranks_in_the_place_of_the_sum() -> Iterator[Audited]:
    with summing(lambda world, tensor: world.sum_(tensor).div_(world.size)) as audited:
        yield audited


@broken("clipping", "longer than the clip norm")
def ranks_add_up_before_anything_is_clipped() -> Iterator[Audited]:
    ordinary = step_module.clipped_sum

    def unclipped(found: Any, parameters: Any, units: Any, _rule: Any, *rest: Any) -> Any:
        return ordinary(found, parameters, units, FlatClipping(clip_norm=1e9), *rest)

    with patched(step_module, "clipped_sum", unclipped) as audited:
        yield audited


@broken("normalising", "accounted size")
def divided_by_the_batch_of_one_rank() -> Iterator[Audited]:
    ordinary = PrivateStep.__init__

    def init(self: PrivateStep, **named: Any) -> None:
        ordinary(self, **named)
        self._share *= self._world.size

    with patched(PrivateStep, "__init__", init) as audited:
        yield audited


# ---------------------------------------------------------------------- sampling
@broken("sampling", "longer than the clip norm")
def every_rank_takes_the_whole_draw() -> Iterator[Audited]:
    with patched(_ranks, "sharded", lambda sampler, _world: sampler) as audited:
        yield audited


@broken("sampling", "longer than the clip norm")
def every_rank_draws_by_a_secret_of_its_own() -> Iterator[Audited]:
    ordinary = _ranks.secrets_of

    def secrets_of(*arguments: Any) -> tuple[bytes, bytes]:
        return fresh_secret(), ordinary(*arguments)[1]

    with patched(_ranks, "secrets_of", secrets_of) as audited:
        yield audited


@broken("sampling", "accounted rate")
def the_part_of_the_last_rank_is_lost() -> Iterator[Audited]:
    ordinary = ShardedSampler.plan

    def plan(self: ShardedSampler, cursor: int, size: int | None) -> Any:
        own = ordinary(self, cursor, size)
        return micro_batches((), None) * len(own) if self._rank else own

    with patched(ShardedSampler, "plan", plan) as audited:
        yield audited


@broken("sampling", "accounted rate")
def ranks_drop_what_does_not_divide_evenly() -> Iterator[Audited]:
    def even(draw: Any, ranks: int, size: int | None) -> Any:
        rows = draw.indices if draw.drawn else ()
        for _ in range(len(rows) % ranks):
            # Not always the last: that some units are drawn too rarely would show first.
            dropped = sum(rows) % len(rows)
            rows = (*rows[:dropped], *rows[dropped + 1 :])
        return [micro_batches(rows[rank::ranks], size) for rank in range(ranks)]

    with patched(shards, "_examples", even) as audited:
        yield audited


@broken("clipping", "longer than the clip norm", rows_of_a_user=3)
def a_user_is_clipped_on_each_rank() -> Iterator[Audited]:
    def divided(draw: Any, ranks: int, size: int | None) -> Any:
        rows = list(zip(draw.indices, draw.units.index, strict=True))
        plans = []
        for rank in range(ranks):
            own: dict[int, list[int]] = {}
            for row, unit in rows[rank::ranks]:
                own.setdefault(unit, []).append(row)
            plans.append(shards.packed([np.array(each) for each in own.values()], size, None))
        return plans

    with patched(shards, "_users", divided) as audited:
        yield audited


# ---------------------------------------------------------------------- ledger
@broken("ledger", "charges the same")
def only_rank_0_charges() -> Iterator[Audited]:
    ordinary = _state.RunState.charge

    def charge(self: Any, made: int) -> int:
        number = ordinary(self, made)
        if torch.distributed.get_rank():
            self.ledger = type(self.ledger)()
        return number

    with patched(_state.RunState, "charge", charge) as audited:
        yield audited
