"""Canaries that are gradients: unit directions added to the clipped sum, as a record would be.

A record whose gradient is always the same direction of norm C is the one that can be seen best, and
a module of any kind can have it. It goes through the same clipping rule, sum and noise as the
gradients of the data; it only has no forward and backward of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_privacy.accounting import GaussianRelease
from lightning_privacy.audit.bounds import neyman_pearson_scores
from lightning_privacy.errors import UnsupportedOperationError
from lightning_privacy.sampling import PoissonSampler
from lightning_privacy.strategies.base import is_sharded

if TYPE_CHECKING:
    from lightning_privacy.callbacks._canary_coins import Coins
    from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
    from lightning_privacy.step import PrivateStep

# Coordinates of one direction, and elements of the parameter that they lie in.
_SPREAD, _LARGEST = 512, 2**22
# Longer than the clip norm, so that what clipping leaves of it is exactly the clip norm.
_LONG = 2.0


class GradientCanaries:
    """Adds the included directions at the private steps that draw them, and watches all of them.

    A direction has ±1/√k on k random coordinates of one parameter, the largest of at most four
    million elements: nearly orthogonal to the others and to the data's gradients.

    Args:
        trainer: The trainer of the fit.
        privacy: The callback that makes it private.
        member: ``[m]`` which directions take part.
        coins: Decide on directions and draws.

    Raises:
        UnsupportedOperationError: Clipping by layer, of which each has a part of the norm; sharded
            parameters; manual optimization; or users whose examples are drawn one by one.
    """

    def __init__(
        self, trainer: Any, privacy: DifferentialPrivacy, member: Tensor, coins: Coins
    ) -> None:
        _refuse(trainer, privacy)
        self._trainer, self._privacy, self._member = trainer, privacy, member
        self._coins = coins
        self._name, self._parameter = "", nn.Parameter(torch.zeros(0))
        self._index, self._signs = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0)
        self._sampler: PoissonSampler | None = None
        self._draws = 0
        self._seen: list[Tensor] = []

    def start(self) -> None:
        """Choose the directions, and join the private run."""
        trained = {
            n: p for n, p in self._trainer.lightning_module.named_parameters() if p.requires_grad
        }
        fitting = [n for n, p in trained.items() if p.numel() <= _LARGEST] or list(trained)
        self._name = max(fitting, key=lambda name: trained[name].numel())
        self._parameter = trained[self._name]
        size, count = self._parameter.numel(), len(self._member)
        generator = self._coins.generator(b"directions")
        spread = min(_SPREAD, max(1, size // 2))
        index = [torch.randperm(size, generator=generator)[:spread] for _ in range(count)]
        self._index = torch.stack(index)
        signs = torch.randint(2, self._index.shape, generator=generator) * 2.0 - 1
        self._signs = signs / math.sqrt(spread)
        plan = self._privacy.plan
        assert plan is not None
        included = int(self._member.sum())
        if included:
            self._sampler = PoissonSampler(
                size=included, sample_rate=plan.sample_rate, secret=self._coins.secret(b"draws")
            )
        self._trainer.strategy.private_run.records = self.contribute

    def contribute(self, step: PrivateStep) -> None:
        """Add the directions that this step draws, each on one rank.

        Args:
            step: The private step, before its release.
        """
        plan = self._privacy.plan
        assert plan is not None
        if self._sampler is None:
            return
        drawn, self._draws = self._sampler.draw(self._draws), self._draws + 1
        world = self._coins.world
        chosen = self._member.nonzero()[:, 0][torch.as_tensor(drawn[world.rank :: world.size])]
        if not len(chosen):
            return
        gradients = torch.zeros(len(chosen), self._parameter.numel())
        gradients.scatter_(1, self._index[chosen], _LONG * plan.clip_norm * self._signs[chosen])
        shaped = gradients.view(len(chosen), *self._parameter.shape).to(self._parameter.device)
        step.contribute({self._name: shaped})

    def observe(self) -> None:
        """Note how far a release went along each direction, in clip norms."""
        plan, gradient = self._privacy.plan, self._parameter.grad
        if plan is None or gradient is None:
            return
        flat = gradient.detach().flatten().double().cpu() * plan.expected_batch_size
        self._seen.append((flat[self._index] * self._signs).sum(1) / plan.clip_norm)

    def scores(self) -> Tensor:
        """``[m]`` the most powerful score where data and other canaries are noise as well."""
        plan, seen = self._privacy.plan, torch.stack(self._seen)
        assert plan is not None
        noise = max(plan.effective_noise_multiplier, float(seen.std()))
        claim = GaussianRelease(
            noise_multiplier=noise, sample_rate=plan.sample_rate, count=len(self._seen)
        )
        return neyman_pearson_scores(seen, claim)


def _refuse(trainer: Any, privacy: DifferentialPrivacy) -> None:
    settings = privacy.settings
    found = [
        name
        for name, wrong in {
            "clipping='per_layer'": settings.clipping == "per_layer",
            "sharded parameters": is_sharded(trainer.strategy),
            "manual optimization": not trainer.lightning_module.automatic_optimization,
            "user_sampling='examples'": settings.user_sampling == "examples",
        }.items()
        if wrong
    ]
    if found:
        raise UnsupportedOperationError(
            must="a gradient canary has one gradient of the whole clip norm in each private step",
            found=", ".join(found),
            cost="an audit of a record that the mechanism does not know",
            remedy='use kind="text", or pass canaries of your own as rows=[...]',
        )
