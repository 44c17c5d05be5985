"""From settings, trainer and loader to the plan: how many draws, how much noise, until when."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from lightning_privacy.accounting.accountants import delta_warning
from lightning_privacy.callbacks._state import RunState, budget_spent
from lightning_privacy.callbacks._tiers import tier_settings, tiered_plan
from lightning_privacy.errors import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
)
from lightning_privacy.noise import GaussianNoise
from lightning_privacy.noise.grid import ROUNDING_SLACK, GridNoise
from lightning_privacy.plan import PrivacyPlan, precision_slack_for, resolve_sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.utils.data import DataLoader

    from lightning_privacy.callbacks._population import Population
    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.distributed import World
    from lightning_privacy.noise import NoiseMechanism
    from lightning_privacy.sampling import ResolvedSampling


def sampling_of(
    settings: PrivacySettings, dataloader: DataLoader, world_size: int, population: Population
) -> ResolvedSampling:
    """Decide the rate and the public normaliser for a training loader.

    Args:
        settings: What the user configured.
        dataloader: The training loader.
        world_size: Number of processes.
        population: What is drawn from.

    Returns:
        Rate, normaliser, relation, steps per epoch, and where they come from.
    """
    if warning := delta_warning(settings.delta, settings.dataset_size or population.units):
        rank_zero_warn(warning)
    return resolve_sampling(
        sample_rate=settings.sample_rate,
        expected_batch_size=settings.expected_batch_size,
        dataset_size=settings.dataset_size,
        actual_size=population.size,
        loader_batch_size=dataloader.batch_size or 1,
        world_size=world_size,
        counted=population.name,
    )


def make_plan(
    settings: PrivacySettings, state: RunState, trainer: Any, sampling: ResolvedSampling
) -> PrivacyPlan:
    """Plan the whole run: what was charged before, and what this fit will add.

    The first fit of a run decides the mechanism; a later or resumed one must keep it, because
    noise that changes after outputs were seen needs another theorem than the accountant's.
    ``state.limit`` is set to what the budget allows.

    Args:
        settings: What the user configured.
        state: What was spent before; gets the plan.
        trainer: The trainer of the fit.
        sampling: What `sampling_of` returned.

    Returns:
        The plan; its steps are those charged already plus those to come.

    Raises:
        ConfigurationError: Training has no end and no budget, or must go on past its budget.
        BudgetExceededError: Nothing is left of the budget.
        GuaranteeError: The configuration is not that of the run that goes on.
    """
    releases = _releases_per_draw(settings, state, trainer)
    # A draw that was charged, and interrupted before its step, is still to come for the trainer.
    done = min(state.steps, trainer.global_step // releases)
    remaining = _remaining(trainer, sampling.steps_per_epoch, releases, done)
    fixed = _fixed_fields(settings, trainer, sampling, releases)
    tiers = None if settings.tiers is None else tier_settings(settings.tiers, fixed)
    plan = (
        _first(settings, fixed, remaining) if state.plan is None else _same(settings, state, fixed)
    )
    if settings.epsilon is not None and state.limit is None:
        calibrated = state.plan is None and settings.noise_multiplier is None
        state.limit = plan.steps if calibrated else plan.max_steps(settings.epsilon)
    planned = _planned(state, remaining)
    _require_room_for_minimum(trainer, state, sampling.steps_per_epoch, planned)
    state.target_epsilon = settings.epsilon if settings.noise_multiplier is None else None
    state.test_seed, state.tiers = settings.test_seed, tiers
    if settings.study is not None:
        plan = settings.study.applied_to(plan)
    state.plan = replace(plan, steps=max(1, planned))
    return state.plan


def _fixed_fields(
    settings: PrivacySettings, trainer: Any, sampling: ResolvedSampling, releases: int
) -> dict[str, Any]:
    return {
        "unit": settings.unit,
        "user_sampling": settings.user_sampling,
        "group_size": settings.group_size,
        "relation": sampling.relation,
        "sample_rate": sampling.sample_rate,
        "expected_batch_size": sampling.expected_batch_size,
        "clip_norm": settings.clip_norm,
        "clipping": settings.clipping,
        "delta": settings.delta,
        "accountant": settings.accountant,
        "precision_slack": _slack(trainer) + (ROUNDING_SLACK if settings.secure_rounding else 0.0),
        "releases_per_draw": releases,
        "deterministic": settings.test_seed is not None or settings.study is not None,
    }


def _slack(trainer: Any) -> float:
    """That of the trainer's precision, or of a module that trains in a coarser one by itself."""
    parameters = trainer.lightning_module.parameters()
    kinds = {str(p.dtype) for p in parameters if p.requires_grad and p.is_floating_point()}
    return max(map(precision_slack_for, [trainer.precision, *sorted(kinds)]))


def _first(settings: PrivacySettings, fixed: dict[str, Any], remaining: int | None) -> PrivacyPlan:
    if settings.noise_multiplier is not None:
        if remaining is None and settings.epsilon is None:
            raise _endless()
        return PrivacyPlan(
            noise_multiplier=settings.noise_multiplier, steps=max(1, remaining or 1), **fixed
        )
    if remaining is None:
        raise _endless()
    assert settings.epsilon is not None
    if settings.tiers is not None:
        return tiered_plan(settings.tiers, fixed, max(1, remaining))
    return PrivacyPlan.calibrated(
        epsilon=settings.epsilon, steps=max(1, remaining), progress=_Announced(), **fixed
    )


class _Announced:
    """Says what a search for the noise is at, once it takes a while."""

    _SECONDS = 3.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, noise_multiplier: float, spent: float) -> None:
        if time.monotonic() - self._last > self._SECONDS:
            self._last = time.monotonic()
            rank_zero_info(
                f"DifferentialPrivacy: looking for the noise; a noise multiplier of "
                f"{noise_multiplier:.4g} costs ε = {spent:.4g}."
            )


def _same(settings: PrivacySettings, state: RunState, fixed: dict[str, Any]) -> PrivacyPlan:
    stored = state.plan
    assert stored is not None
    before = stored.to_dict()
    wanted = {**fixed, "unit": str(fixed["unit"]), "relation": str(fixed["relation"])}
    if settings.noise_multiplier is not None:
        wanted["noise_multiplier"] = settings.noise_multiplier
    if settings.tiers is not None:
        # They come from the settings that are compared below.
        wanted = {name: wanted[name] for name in wanted if name not in {"clip_norm", "sample_rate"}}
    if fixed["precision_slack"] <= stored.precision_slack:
        # Contributions exceed C by less than is accounted for: the earlier figure stays a bound.
        del wanted["precision_slack"]
    differences = [
        f"{name} {before[name]!r} there, {value!r} here"
        for name, value in wanted.items()
        if before[name] != value
    ]
    if settings.noise_multiplier is None and state.target_epsilon != settings.epsilon:
        differences.append(
            f"noise calibrated for ε {state.target_epsilon!r} there, {settings.epsilon!r} here"
        )
    own = None if settings.tiers is None else tier_settings(settings.tiers, fixed)
    if state.tiers != own:
        differences.append(f"tiers {state.tiers!r} there, {own!r} here")
    if state.test_seed != settings.test_seed:
        differences.append("test_seed")
    if differences:
        raise GuaranteeError(
            must="a run goes on with the mechanism that it began with",
            found=f"this differs from the earlier steps: {'; '.join(differences)}",
            cost="a mechanism chosen after outputs were seen, for which this ε is not proven",
            remedy="restore the configuration, or load the weights only and start a run of its "
            "own: the two ε add up",
        )
    return stored


def _releases_per_draw(settings: PrivacySettings, state: RunState, trainer: Any) -> int:
    if settings.releases_per_draw is not None:
        return settings.releases_per_draw
    if trainer.lightning_module.automatic_optimization:
        return 1
    # While configure_optimizers runs (estimated_stepping_batches) there are no optimizers yet.
    if not trainer.optimizers and state.plan is not None:
        return state.plan.releases_per_draw
    return max(1, len(trainer.optimizers))


def _remaining(trainer: Any, epoch: int, releases: int, done: int) -> int | None:
    """How many draws this fit will still make; None if it has no end of its own."""
    limit = trainer.limit_train_batches
    batches = min(epoch, limit) if isinstance(limit, int) else int(epoch * limit)
    if limit and not batches:
        raise ConfigurationError(
            must="limit_train_batches leaves a private step in each epoch",
            found=f"limit_train_batches={limit} of {epoch} private steps",
            cost="epochs without training",
            remedy="pass a whole number of steps, or a larger share",
        )
    ends = []
    if trainer.max_epochs not in {None, -1}:
        ends.append(trainer.max_epochs * batches)
    if trainer.max_steps != -1:
        ends.append(math.ceil(trainer.max_steps / releases))
    return max(0, min(ends) - done) if ends else None


def _planned(state: RunState, remaining: int | None) -> int:
    count, limit = state.ledger.count, state.limit
    if remaining is None:
        if limit is None:
            raise _endless()
        remaining = max(0, limit - count)
        if not remaining:
            raise budget_spent(count, limit)
    if limit is None or count + remaining <= limit:
        return count + remaining
    if count >= limit:
        raise budget_spent(count, limit)
    say = rank_zero_warn if state.target_epsilon is not None else rank_zero_info
    say(
        f"The budget allows {limit - count} more private steps: training stops after them, and "
        f"before the {remaining} that the trainer is set to."
    )
    return limit


def _require_room_for_minimum(trainer: Any, state: RunState, epoch: int, planned: int) -> None:
    least = max(trainer.min_steps or 0, (trainer.min_epochs or 0) * epoch) - state.steps
    if state.limit is not None and state.ledger.count + least > planned:
        raise BudgetExceededError(
            must=f"min_steps and min_epochs fit the budget, {state.limit} private steps in all",
            found=f"min_steps={trainer.min_steps}, min_epochs={trainer.min_epochs}",
            cost="Lightning would go on after the budget is spent",
            remedy="lower the minimum, or raise the noise or the budget",
        )


def _endless() -> ConfigurationError:
    return ConfigurationError(
        must="training has an end that is known before it starts",
        found="neither max_steps nor max_epochs, and no budget with a fixed noise",
        cost="an ε that grows without a bound",
        remedy="set Trainer(max_epochs=...) or max_steps, or pass both epsilon and "
        "noise_multiplier: training then stops before ε is exceeded",
    )


def noise_of(
    settings: PrivacySettings,
    plan: PrivacyPlan,
    secret: bytes,
    world: World,
    parameters: Mapping[str, nn.Parameter],
) -> NoiseMechanism:
    """Make the source of noise of a run.

    Args:
        settings: What the user configured.
        plan: Says how much noise.
        secret: Keys it.
        world: The ranks over which a sum is spread.
        parameters: What is released, whole.

    Returns:
        The noise of this rank.
    """
    noise = GaussianNoise(secret)
    if not settings.secure_rounding or not plan.noise_multiplier:
        return noise
    return GridNoise(
        noise,
        noise_multiplier=plan.noise_multiplier,
        dimension=sum(parameter.numel() for parameter in parameters.values()),
        parts=world.noise_parts,
    )
