"""What has to hold before the first step, in the order in which it can be known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_privacy.callbacks import _ranks, _validation
from lightning_privacy.callbacks._checks import RowChecks
from lightning_privacy.callbacks._planning import noise_of
from lightning_privacy.errors import UnsupportedOperationError
from lightning_privacy.strategies import require_same
from lightning_privacy.study import StudyStep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.clipping.layout import Layouts
    from lightning_privacy.distributed import World
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.step import PrivateStep
    from lightning_privacy.strategies import PrivateRun


def checked_parameters(
    settings: PrivacySettings, run: PrivateRun, world: World
) -> tuple[dict[str, nn.Parameter], Layouts]:
    """Check module, optimizers, replicas and examples.

    Args:
        settings: What the user configured.
        run: The private run, with its loader.
        world: The ranks.

    Returns:
        The covered parameters by name, and where the rows of a batch lie.

    Raises:
        PrivacyError: Something does not hold.
    """
    trainer, module = run.trainer, run.module
    if world.lockstep:
        _refuse_study(settings)
        _ranks.refuse_local_steps(settings)
    _validation.refuse_module(module, settings.independent_buffers)
    names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
    _validation.refuse_optimizers(trainer.optimizers, names)
    parameters = run.trainable()
    require_same(world, {name: parameter.numel() for name, parameter in parameters.items()})
    _validation.warn_compiled(module)
    if world.is_first:
        _validation.warn_restarted(trainer)
    _ranks.refuse_collectives(world, trainer, run)
    return parameters, RowChecks(settings, trainer, run, parameters).before_training()


def make_step(
    settings: PrivacySettings,
    run: PrivateRun,
    world: World,
    checked: tuple[Mapping[str, nn.Parameter], Layouts],
    plan: PrivacyPlan,
    secret: bytes,
) -> PrivateStep:
    """Make the private step of a fit.

    Args:
        settings: What the user configured.
        run: The private run.
        world: The ranks.
        checked: From `checked_parameters`.
        plan: The plan.
        secret: Keys this rank's noise.

    Returns:
        The step.
    """
    parameters, layouts = checked
    make = run.step_class if settings.study is None else StudyStep
    step = make(
        parameters=parameters,
        plan=plan,
        noise=noise_of(settings, plan, secret, world, parameters),
        loss_reduction=settings.loss_reduction,
        local_rate=settings.local_learning_rate or 0.0,
        world=world,
    )
    step.layouts = layouts
    return step


def _refuse_study(settings: PrivacySettings) -> None:
    if settings.study is not None:
        raise UnsupportedOperationError(
            must="a study keeps whole parameters in each process",
            found="study mode with sharded parameters",
            cost="a step that does not leave out what the study says",
            remedy='use strategy="private_ddp", or one process',
        )
