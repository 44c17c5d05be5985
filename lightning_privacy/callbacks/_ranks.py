"""What the ranks of a private fit share, what each keeps to itself, and that they are alike."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_privacy.callbacks._probe import LossProbe, attributes_kept
from lightning_privacy.clipping.randomness import preserved_state
from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError
from lightning_privacy.noise import fresh_secret, secret_from_seed
from lightning_privacy.sampling import ShardedSampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.callbacks._state import RunState
    from lightning_privacy.distributed import World
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.sampling.base import Sampler
    from lightning_privacy.strategies import PrivateRun


def secrets_of(world: World, state: RunState, test_seed: int | None) -> tuple[bytes, bytes]:
    """Make this rank's secrets, and let all ranks go on from what rank 0 has spent.

    Args:
        world: The ranks.
        state: What was spent and handed out.
        test_seed: Decides both in deterministic test mode.

    Returns:
        That of the draws, which all ranks know, because all have to draw the same units; and that
        of this rank's noise, which no other rank knows.
    """
    if test_seed is None and state.bound_seed is None:
        state.bound_seed = fresh_secret()
    state.agree(world)
    if test_seed is not None:
        common = secret_from_seed(test_seed)
        return common, world.own_secret(common)
    own = fresh_secret()
    return world.shared_secret(own), own if world.alone else fresh_secret()


def sharded(sampler: Sampler, world: World) -> Sampler:
    """This rank's part of the draws.

    Args:
        sampler: The draws.
        world: The ranks.

    Returns:
        The part; all of it where there is one process.
    """
    if world.alone:
        return sampler
    return ShardedSampler(sampler, rank=world.rank, size=world.size)


def require_one_plan(world: World, plan: PrivacyPlan, rows: int) -> None:
    """Refuse ranks that would draw from different data, or by different plans.

    Args:
        world: The ranks.
        plan: This rank's plan.
        rows: Length of this rank's data set.

    Raises:
        GuaranteeError: They differ.
    """
    everywhere = world.gathered({"rows of the data set": rows, **plan.to_dict()})
    differing = [
        f"{name} {', '.join(str(each[name]) for each in everywhere)}"
        for name in everywhere[0]
        if any(each[name] != everywhere[0][name] for each in everywhere)
    ]
    if differing:
        raise GuaranteeError(
            must="every rank holds the whole data set and the same plan",
            found=f"by rank: {'; '.join(differing)}",
            cost="draws of different units on each rank, at rates that nobody accounts for",
            remedy="give every rank the same loader; the draws are spread over ranks by themselves",
        )


def refuse_collectives(world: World, trainer: Any, run: PrivateRun) -> None:
    """Refuse a training step in which ranks see each other's examples.

    Args:
        world: The ranks.
        trainer: The trainer of the fit.
        run: The private run, with its loader.

    Raises:
        UnsupportedOperationError: The step communicates with other ranks.
    """
    if world.alone:
        return
    module = trainer.lightning_module
    assert run.loader is not None
    with attributes_kept(module), preserved_state(module), _NoCollectives(world.lockstep):
        LossProbe(trainer, run.loader, run)([0])


def refuse_local_steps(settings: PrivacySettings) -> None:
    """Refuse steps of one user on parameters that are sharded.

    Args:
        settings: What the user configured.

    Raises:
        UnsupportedOperationError: They are asked for.
    """
    if settings.user_update == "local_steps":
        raise UnsupportedOperationError(
            must="user_update='local_steps' goes with whole parameters on each rank",
            found="sharded parameters, which all ranks gather from one another",
            cost="a step of one rank's user would change the other ranks' models, or memory that "
            "is not there between two passes",
            remedy='use user_update="mean", or strategy="private_ddp"',
        )


class _NoCollectives(TorchDispatchMode):
    """Raises where an operation talks to other ranks, before it does."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self._sharded = sharded

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        gathers_parameters = "_allgather_base_" in str(func) and self._sharded and _asked_by_fsdp()
        if str(func).startswith(("c10d.", "_c10d_functional")) and not gathers_parameters:
            raise UnsupportedOperationError(
                must="a training step reads the examples of its own rank only",
                found=f"a training step that calls {func}",
                cost="gradients that depend on examples of other ranks, beyond clip_norm",
                remedy="compute the loss from the batch alone; log with sync_dist=True",
            )
        return func(*args, **(kwargs or {}))


def _asked_by_fsdp() -> bool:
    """Whether FSDP gathers parameters now: what a training step calls itself has no such frame."""
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("torch.distributed.fsdp."):
            return True
        frame = frame.f_back
    return False
