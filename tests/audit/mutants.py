"""Broken trainers: patches to the shipped source, and wrong uses of its public seams.

Each is a context manager that breaks one thing and gives what is then audited. A privacy bug that
is found later becomes a mutant here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_privacy import DifferentialPrivacy
from lightning_privacy import step as step_module
from lightning_privacy.accounting import GaussianRelease, Ledger
from lightning_privacy.callbacks import _planning, _ranks, _state, differential_privacy
from lightning_privacy.clipping.norms import FlatClipping, clipping_rule
from lightning_privacy.noise import GaussianNoise, secret_from_seed
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.sampling import PoissonSampler, micro_batches, poisson, user_draws
from lightning_privacy.sampling.base import packed
from lightning_privacy.step import PrivateStep

Audited = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """A broken trainer.

    Attributes:
        area: What is broken: sampling, clipping, noise, normalising or ledger.
        seam: "source" for a patch, "public" for what a user could do.
        broken: Breaks it, and gives what is audited.
        sign: What the audit's failure says, or a part of it.
        options: What `verify_trainer` is asked for.
    """

    area: str
    seam: str
    broken: Callable[[], Any]
    sign: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


MUTANTS: dict[str, Mutant] = {}
# What is below the resolution of the audit: these are not caught, and the table says so.
SUBTLE: dict[str, Mutant] = {}


def mutant(
    area: str, sign: str, seam: str = "source", into: dict[str, Mutant] = MUTANTS, **options: Any
) -> Callable[[Any], Any]:
    def register(function: Callable[[], Iterator[Audited]]) -> Callable[[], Iterator[Audited]]:
        name = function.__name__.replace("_", " ")
        into[name] = Mutant(area, seam, contextmanager(function), sign, options)
        return function

    return register


@contextmanager
def patched(owner: Any, name: str, new: Any) -> Iterator[Audited]:
    with mock.patch.object(owner, name, new):
        yield DifferentialPrivacy


def altered(**change: Callable[[Any], Any]) -> Audited:
    """The callback, with other settings than it was given."""

    def make(**settings: Any) -> Any:
        return DifferentialPrivacy(
            **{n: change[n](v) if n in change else v for n, v in settings.items()}
        )

    return make


# ---------------------------------------------------------------------- sampling
def drawing(draw: Callable[[PoissonSampler, Any, int], Any]) -> Any:
    ordinary = PoissonSampler.draw
    return patched(PoissonSampler, "draw", lambda self, cursor: draw(self, ordinary, cursor))


def generator(sampler: PoissonSampler, cursor: int) -> np.random.Generator:
    return np.random.default_rng(sampler.worker_seed(cursor))


@mutant("sampling", "varies as")
def shuffled_epochs_instead_of_poisson() -> Iterator[Audited]:
    def draw(sampler: PoissonSampler, _ordinary: Any, cursor: int) -> Any:
        size = round(sampler.size * sampler.sample_rate)
        epoch, place = divmod(cursor, sampler.size // size)
        order = generator(sampler, epoch).permutation(sampler.size)
        return np.sort(order[place * size : (place + 1) * size])

    with drawing(draw) as audited:
        yield audited


@mutant("sampling", "size of a draw")
def draws_of_one_size() -> Iterator[Audited]:
    def draw(sampler: PoissonSampler, _ordinary: Any, cursor: int) -> Any:
        size = round(sampler.size * sampler.sample_rate)
        return generator(sampler, cursor).choice(sampler.size, size, replace=False)

    with drawing(draw) as audited:
        yield audited


@mutant("sampling", "accounted rate")
def a_rate_that_is_off_by_one_row() -> Iterator[Audited]:
    def draw(sampler: PoissonSampler, _ordinary: Any, cursor: int) -> Any:
        rate = sampler.sample_rate + 1 / sampler.size
        return np.flatnonzero(generator(sampler, cursor).random(sampler.size) < rate)

    with drawing(draw) as audited:
        yield audited


@mutant("sampling", "earlier draws")
def every_draw_used_twice() -> Iterator[Audited]:
    with drawing(lambda self, ordinary, cursor: ordinary(self, cursor // 2)) as audited:
        yield audited


@mutant("sampling", "earlier draws")
def the_same_draws_in_every_epoch() -> Iterator[Audited]:
    with drawing(lambda self, ordinary, cursor: ordinary(self, cursor % 4)) as audited:
        yield audited


@mutant("sampling", "accounted rate")
def the_last_micro_batch_is_dropped() -> Iterator[Audited]:
    def cut(draw: Any, size: int | None) -> Any:
        parts = micro_batches(draw, size)
        return parts[: max(1, len(parts) - 1)]

    with patched(poisson, "micro_batches", cut) as audited:
        yield audited


@mutant("sampling", "varies as")
def one_draw_decides_for_pairs_of_rows() -> Iterator[Audited]:
    def draw(sampler: PoissonSampler, _ordinary: Any, cursor: int) -> Any:
        pairs = generator(sampler, cursor).random(-(-sampler.size // 2)) < sampler.sample_rate
        return np.flatnonzero(np.repeat(pairs, 2)[: sampler.size])

    with drawing(draw) as audited:
        yield audited


@mutant("sampling", "rate")
def empty_draws_are_drawn_again() -> Iterator[Audited]:
    def draw(sampler: PoissonSampler, ordinary: Any, cursor: int) -> Any:
        rows = ordinary(sampler, cursor)
        while not len(rows):
            cursor += 10**6
            rows = ordinary(sampler, cursor)
        return rows

    with drawing(draw) as audited:
        yield audited


@mutant("sampling", "seed_everything")
def secrets_that_follow_from_the_seed() -> Iterator[Audited]:
    def secret() -> bytes:
        return secret_from_seed(torch.initial_seed())

    with patched(_ranks, "fresh_secret", secret) as audited:
        yield audited


# ---------------------------------------------------------------------- clipping
def scaling(change: Callable[[FlatClipping, Tensor, Tensor], Tensor]) -> Any:
    ordinary = FlatClipping.factors
    return patched(
        FlatClipping,
        "factors",
        lambda self, squared: change(self, squared, ordinary(self, squared)),
    )


def summing(change: Callable[[Any, Any], Any]) -> Any:
    """Change what the clipped sum of a micro-batch is; `change` gets it and the units."""
    ordinary = step_module.clipped_sum

    # By name and in full: a mutant that no longer fits the source must fail, not do nothing.
    def total(
        found: Any, parameters: Any, units: Any, rule: Any, buffer: Any, share: float, add: Any,
        further: Any,
    ) -> Any:  # fmt: skip
        part = ordinary(found, parameters, units, rule, buffer, share, None, further)
        part = change(part, rule)
        for name, gradient in part.gradients.items():
            add(name, gradient)
        return part

    return patched(step_module, "clipped_sum", total)


def times(part: Any, factor: float) -> Any:
    gradients = {name: value * factor for name, value in part.gradients.items()}
    buffered = None if part.buffered is None else part.buffered * factor
    return dataclasses.replace(part, gradients=gradients, buffered=buffered)


def sums(part: Any) -> list[Tensor]:
    return [*part.gradients.values(), *([] if part.buffered is None else [part.buffered])]


@mutant("clipping", "longer than the clip norm", rows_of_a_user=3)
def a_user_is_clipped_row_by_row() -> Iterator[Audited]:
    def apart(units: Any, size: int | None, shares: Any = None) -> Any:
        return micro_batches([row for unit in units for row in unit], size)

    with patched(user_draws, "packed", apart) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm", rows_of_a_user=6)
def a_user_is_clipped_in_each_micro_batch() -> Iterator[Audited]:
    def closed(units: Any, size: int | None, shares: Any = None) -> Any:
        return tuple(
            part
            if part.units is None
            else dataclasses.replace(part, units=dataclasses.replace(part.units, unfinished=False))
            for part in packed(units, size, shares)
        )

    with patched(user_draws, "packed", closed) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm")
def nothing_is_clipped() -> Iterator[Audited]:
    with scaling(lambda _s, _n, factors: torch.ones_like(factors)) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm")
def clipped_to_twice_the_norm() -> Iterator[Audited]:
    with scaling(lambda _s, _n, factors: 2 * factors) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm")
def every_layer_is_clipped_to_the_whole_norm() -> Iterator[Audited]:
    def rule(_kind: str, clip_norm: float, names: Any) -> Any:
        names = list(names)
        layers = len({name.rpartition(".")[0] for name in names})
        wide = clipping_rule("per_layer", clip_norm * math.sqrt(layers), names)
        return mock.Mock(wraps=wide, sensitivity=clip_norm, groups=wide.groups)

    with patched(step_module, "clipping_rule", rule) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm")
def the_norm_is_of_half_the_coordinates() -> Iterator[Audited]:
    with scaling(lambda self, n, _f: (self.clip_norm / (n / 2).sqrt()).clamp(max=1)) as audited:
        yield audited


@mutant("clipping", "over all parameters")
def a_norm_that_overflows_is_not_clipped() -> Iterator[Audited]:
    def change(_self: FlatClipping, squared: Tensor, factors: Tensor) -> Tensor:
        return torch.where(squared.half().isinf(), 1.0, factors)

    with scaling(change) as audited:
        yield audited


@mutant("clipping", "clip norm")
def the_batch_is_clipped_as_one() -> Iterator[Audited]:
    ordinary = step_module.clipped_sum

    def total(
        found: Any, parameters: Any, units: Any, rule: Any, buffer: Any, share: float, add: Any,
        further: Any,
    ) -> Any:  # fmt: skip
        unbounded = FlatClipping(clip_norm=1e9)
        part = ordinary(found, parameters, units, unbounded, buffer, share, None, further)
        norm = math.sqrt(sum(float(g.square().sum()) for g in sums(part)))
        part = times(part, min(1.0, share * rule.sensitivity / norm) if norm else 1.0)
        for name, gradient in part.gradients.items():
            add(name, gradient)
        return part

    with patched(step_module, "clipped_sum", total) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm")
def a_micro_batch_is_added_twice() -> Iterator[Audited]:
    with summing(lambda part, _rule: times(part, 2.0)) as audited:
        yield audited


@mutant("clipping", "longer than the clip norm")
def the_loss_scale_stays_in_the_sum() -> Iterator[Audited]:
    with summing(lambda part, _rule: times(part, 1024.0)) as audited:
        yield audited


# ---------------------------------------------------------------------- noise
def noising(add: Callable[..., Tensor]) -> Any:
    ordinary = GaussianNoise.add_

    def patch(self: Any, tensor: Tensor, name: str, release: int, std: float) -> Tensor:
        return add(ordinary, self, tensor, name, release, std)

    return patched(GaussianNoise, "add_", patch)


def one_by_one() -> Any:
    """No parameters share a draw of noise, as large ones do not."""
    return patched(step_module, "bundles", lambda chosen: [(name,) for name in chosen])


def weaker(factor: float) -> Any:
    return noising(
        lambda ordinary, self, tensor, name, release, std: ordinary(
            self, tensor, name, release, factor * std
        )
    )


@mutant("noise", "accounted size")
def half_the_noise() -> Iterator[Audited]:
    with weaker(0.5) as audited:
        yield audited


@mutant("noise", "accounted size")
def nine_tenths_of_the_noise() -> Iterator[Audited]:
    with weaker(0.9) as audited:
        yield audited


@mutant("noise", "accounted size")
def noise_divided_among_two_ranks() -> Iterator[Audited]:
    with weaker(math.sqrt(0.5)) as audited:
        yield audited


@mutant("noise", "every parameter")
def a_bias_without_noise() -> Iterator[Audited]:
    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, *rest: Any) -> Tensor:
        return tensor if name.endswith("0.bias") else ordinary(self, tensor, name, *rest)

    with one_by_one(), noising(add) as audited:
        yield audited


@mutant("noise", "every step")
def no_noise_at_one_step_in_twenty() -> Iterator[Audited]:
    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, release: int, std: float) -> Any:
        return ordinary(self, tensor, name, release, 0.0 if release % 20 == 3 else std)

    with noising(add) as audited:
        yield audited


@mutant("noise", "two steps share")
def noise_that_is_used_again() -> Iterator[Audited]:
    kept: dict[tuple[int, str], Tensor] = {}

    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, release: int, std: float) -> Any:
        key = (id(self), name)
        if key not in kept:
            kept[key] = ordinary(self, torch.zeros_like(tensor), name, release, 1.0)
        return tensor.add_(kept[key], alpha=std)

    with noising(add) as audited:
        yield audited


@mutant("noise", "two steps share")
def noise_that_takes_back_the_last_one() -> Iterator[Audited]:
    kept: dict[tuple[int, str], Tensor] = {}

    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, release: int, std: float) -> Any:
        old = kept.pop((id(self), name), None)
        if old is not None:
            return tensor.sub_(old)
        new = ordinary(self, torch.zeros_like(tensor), name, release, std)
        kept[id(self), name] = new
        return tensor.add_(new)

    with noising(add) as audited:
        yield audited


@mutant("noise", "two parameters share")
def one_stream_for_all_parameters() -> Iterator[Audited]:
    def add(_ordinary: Any, self: Any, tensor: Tensor, _n: str, release: int, std: float) -> Any:
        draw = torch.Generator().manual_seed(hash((self._secret, release)) % 2**31)
        return tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=std)

    with one_by_one(), noising(add) as audited:
        yield audited


@mutant("noise", "normal")
def uniform_noise_of_the_same_size() -> Iterator[Audited]:
    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, release: int, std: float) -> Any:
        normal = ordinary(self, torch.zeros_like(tensor), name, release, 1.0)
        uniform = torch.special.ndtr(normal.double()) - 0.5
        return tensor.add_((uniform * math.sqrt(12) * std).to(tensor.dtype))

    with noising(add) as audited:
        yield audited


@mutant("noise", "seed_everything")
def noise_from_the_global_generator() -> Iterator[Audited]:
    def add(_ordinary: Any, _self: Any, tensor: Tensor, _name: str, _r: int, std: float) -> Any:
        return tensor.add_(torch.randn(tensor.shape), alpha=std)

    # As the user has seeded it; a fit without this would hide the seed.
    with patched(differential_privacy, "hide_chance", lambda *_: None), noising(add) as audited:
        yield audited


@mutant("noise", "accounted size")
def noise_that_is_not_scaled_by_the_clip_norm() -> Iterator[Audited]:
    with patched(FlatClipping, "sensitivity", property(lambda _self: 1.0)) as audited:
        yield audited


# ---------------------------------------------------------------------- normalising
def releasing(change: Callable[[PrivateStep, Any], float]) -> Any:
    """Multiply what is released by a factor that `change` computes from the statistics."""
    ordinary = PrivateStep.release

    def release(self: PrivateStep, *arguments: Any, **named: Any) -> Any:
        statistics = ordinary(self, *arguments, **named)
        factor = change(self, statistics)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad *= factor
        return statistics

    return patched(PrivateStep, "release", release)


@mutant("normalising", "accounted size")
def divided_by_the_realised_batch() -> Iterator[Audited]:
    def change(step: PrivateStep, statistics: Any) -> float:
        return float(step._plan.expected_batch_size / max(1, statistics.units))

    with releasing(change) as audited:
        yield audited


@mutant("normalising", "accounted size")
def divided_by_the_micro_batches_too() -> Iterator[Audited]:
    with releasing(lambda _step, statistics: 1 / max(1, len(statistics._parts))) as audited:
        yield audited


def resolving(change: Callable[..., dict[str, Any]]) -> Any:
    ordinary = _planning.resolve_sampling

    def resolve(**given: Any) -> Any:
        return ordinary(**given)._replace(**change(**given))

    return patched(_planning, "resolve_sampling", resolve)


@mutant("normalising", "whatever the data's length")
def a_normaliser_of_floor_nq() -> Iterator[Audited]:
    def change(*, actual_size: int, expected_batch_size: int, dataset_size: int, **_: Any) -> Any:
        size = math.floor(actual_size * expected_batch_size / dataset_size)
        return {"expected_batch_size": float(max(1, size))}

    with resolving(change) as audited:
        yield audited


@mutant("normalising", "whatever the data's length")
def a_rate_from_the_private_length() -> Iterator[Audited]:
    def change(*, actual_size: int, expected_batch_size: int, **_: Any) -> Any:
        return {"sample_rate": min(1.0, expected_batch_size / actual_size)}

    with resolving(change) as audited:
        yield audited


# ---------------------------------------------------------------------- ledger
@mutant("ledger", "after a resume")
def the_ledger_is_not_restored() -> Iterator[Audited]:
    ordinary = _state.RunState.restore

    def restore(self: Any, *arguments: Any) -> None:
        ordinary(self, *arguments)
        self.ledger = Ledger()

    with patched(_state.RunState, "restore", restore) as audited:
        yield audited


@mutant("ledger", "is charged")
def every_other_step_is_charged() -> Iterator[Audited]:
    ordinary, calls = Ledger.record, []

    def record(self: Ledger, release: GaussianRelease) -> None:
        calls.append(release)
        if len(calls) % 2 or release.count != 1:
            ordinary(self, release)

    with patched(Ledger, "record", record) as audited:
        yield audited


@mutant("ledger", "another accountant")
def half_the_rate_is_charged() -> Iterator[Audited]:
    ordinary = PrivacyPlan.release

    def release(self: PrivacyPlan, count: int) -> GaussianRelease:
        return dataclasses.replace(ordinary(self, count), sample_rate=self.sample_rate / 2)

    with patched(PrivacyPlan, "release", release) as audited:
        yield audited


@mutant("ledger", "another accountant")
def more_noise_is_charged_than_was_added() -> Iterator[Audited]:
    more = property(lambda self: 1.05 * self.noise_multiplier)
    with patched(PrivacyPlan, "effective_noise_multiplier", more) as audited:
        yield audited


@mutant("ledger", "another accountant")
def epsilon_of_the_central_limit() -> Iterator[Audited]:
    def optimistic(releases: Any, plan: PrivacyPlan) -> float:
        from lightning_privacy.metrics.functional import gaussian_epsilon

        # μ = q sqrt(T (exp(1/σ²) − 1)): Gaussian only in the limit.
        squares = sum(
            r.count * r.sample_rate**2 * math.expm1(min(50.0, r.noise_multiplier**-2))
            for r in releases
        )
        return gaussian_epsilon(math.sqrt(squares), plan.delta)

    with patched(differential_privacy, "epsilon_of", optimistic) as audited:
        yield audited


# ---------------------------------------------------------------------- public seams
class Afterwards(DifferentialPrivacy):
    """A subclass that looks at the raw loss once more when the noise is on."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5


class NotPrivate(Callback):
    """Reports an ε and does nothing."""

    steps = 100

    def __init__(self, **settings: Any) -> None:
        self.plan = mock.Mock(sample_rate=0.25, expected_batch_size=6)

    def epsilon(self) -> float:
        return 1e9


@mutant("clipping", "accounted size", "public")
def twice_the_clip_norm_is_set() -> Iterator[Audited]:
    yield altered(clip_norm=lambda norm: 2 * norm)


@mutant("noise", "accounted size", "public")
def less_noise_is_set() -> Iterator[Audited]:
    yield altered(noise_multiplier=lambda sigma: 0.9 * sigma)


@mutant("normalising", "accounted size", "public")
def another_batch_size_is_set() -> Iterator[Audited]:
    yield altered(expected_batch_size=lambda size: size + 1)


@mutant("noise", "accounted size", "public")
def the_released_gradient_is_scaled_down() -> Iterator[Audited]:
    yield Afterwards


@mutant("ledger", "another accountant", "public")
def a_known_seed() -> Iterator[Audited]:
    yield lambda **settings: DifferentialPrivacy(test_seed=1, **settings)


@mutant("noise", "", "public")
def a_callback_that_does_nothing() -> Iterator[Audited]:
    yield NotPrivate


# ---------------------------------------------------------------------- below the resolution
@mutant("noise", "", into=SUBTLE)
def noise_that_is_half_a_per_cent_weaker() -> Iterator[Audited]:
    with weaker(0.995) as audited:
        yield audited


@mutant("noise", "", into=SUBTLE)
def noise_without_tails_beyond_five_sigma() -> Iterator[Audited]:
    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, release: int, std: float) -> Any:
        noise = ordinary(self, torch.zeros_like(tensor), name, release, std)
        return tensor.add_(noise.clamp(-5 * std, 5 * std))

    with noising(add) as audited:
        yield audited


@mutant("noise", "", into=SUBTLE)
def noise_that_repeats_after_a_thousand_steps() -> Iterator[Audited]:
    kept: dict[tuple[int, str, int], Tensor] = {}

    def add(ordinary: Any, self: Any, tensor: Tensor, name: str, release: int, std: float) -> Any:
        key = (id(self), name, release % 1000)
        if key not in kept:
            kept[key] = ordinary(self, torch.zeros_like(tensor), name, release, 1.0)
        return tensor.add_(kept[key], alpha=std)

    with noising(add) as audited:
        yield audited


@mutant("sampling", "", into=SUBTLE)
def a_rate_that_is_three_per_cent_too_high() -> Iterator[Audited]:
    def draw(sampler: PoissonSampler, _ordinary: Any, cursor: int) -> Any:
        chosen = generator(sampler, cursor).random(sampler.size) < 1.03 * sampler.sample_rate
        return np.flatnonzero(chosen)

    with drawing(draw) as audited:
        yield audited
