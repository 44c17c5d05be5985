"""What a trainer must not be set to in a private fit: refused before any training step."""

from __future__ import annotations

import inspect
import os
import warnings
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Final

import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from torchmetrics import Metric

from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError
from lightning_privacy.plan import precision_slack_for
from lightning_privacy.strategies.refusals import accumulation_refused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import Callback, LightningModule
    from torch import nn
    from torch.optim import Optimizer


# How often torchrun, or SLURM, has started the same job before.
_RESTARTS: Final = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def refuse_trainer(trainer: Any, module: LightningModule, callback: Callback) -> None:
    """Refuse what a trainer can be set to and no private fit can carry.

    Args:
        trainer: The trainer of the fit.
        module: The module to be trained.
        callback: The `DifferentialPrivacy` callback.

    Raises:
        ConfigurationError: There are two privacy callbacks.
        UnsupportedOperationError: Any other setting that has no sound private counterpart.
    """
    _refuse_two(trainer, callback)
    _refuse_accumulation(trainer)
    _refuse_precision(trainer)
    _refuse_searches(trainer)
    if trainer.overfit_batches:
        raise UnsupportedOperationError(
            must="each step draws from the whole data set",
            found=f"overfit_batches={trainer.overfit_batches}",
            cost="fixed batches, for which subsampling amplifies nothing",
            remedy="use limit_train_batches, or debug without the callback",
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedOperationError(
            must="training_step takes a batch",
            found="training_step(dataloader_iter)",
            cost="batches that the module fetches by itself, past the draws that are accounted",
            remedy="define training_step(self, batch, batch_idx)",
        )
    if trainer.gradient_clip_val:
        warnings.warn(
            f"gradient_clip_val={trainer.gradient_clip_val} acts on the gradient after noise was "
            "added. That is legal and changes no ε, but it is not the clipping that privacy "
            "needs: clip_norm is.",
            stacklevel=2,
        )


def refuse_module(module: nn.Module, independent: Sequence[str]) -> None:
    """Refuse a module without a parameter that trains, or that would save metrics.

    Args:
        module: The module to be trained.
        independent: Names or patterns declared to be independent of the data.

    Raises:
        ConfigurationError: Nothing is trainable, or a parameter has no shape yet.
        GuaranteeError: A metric keeps persistent states and is not declared.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigurationError(
            must="the module has trainable parameters",
            found="none",
            cost="there is no gradient to protect",
            remedy="unfreeze what should be trained",
        )
    if lazy := [n for n, p in module.named_parameters() if torch.nn.parameter.is_lazy(p)]:
        raise ConfigurationError(
            must="every parameter has its shape before the fit starts",
            found=f"lazy parameters: {', '.join(lazy[:8])}",
            cost="weights that no check has seen and nothing clips",
            remedy="run the module once on a made-up batch before trainer.fit, or give layers "
            "their input sizes",
        )
    ordinary = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    metrics = [name for name, part in module.named_modules() if isinstance(part, Metric)]
    saved = [
        key
        for key in module.state_dict()
        if key not in ordinary
        and any(key.startswith(f"{name}.") for name in metrics)
        and not any(fnmatch(key, pattern) for pattern in independent)
    ]
    if saved:
        raise GuaranteeError(
            must="nothing that was computed on private data is saved without noise",
            found=f"persistent metric states {', '.join(saved)}",
            cost="statistics of private data in every checkpoint, which no ε covers",
            remedy="make them persistent=False, or name them in independent_buffers",
        )


def refuse_optimizers(optimizers: Sequence[Optimizer], covered: Mapping[int, str]) -> None:
    """Refuse optimizers that no private step can serve, and warn of parameters that none holds.

    Args:
        optimizers: What ``configure_optimizers`` returned.
        covered: Names of the parameters that the private step covers, by ``id``.

    Raises:
        UnsupportedOperationError: An optimizer evaluates its closure several times per step.
        GuaranteeError: An optimizer holds a parameter that the private step does not cover.
    """
    held: set[int] = set()
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UnsupportedOperationError(
                must="an optimizer evaluates its closure once per step",
                found="LBFGS, which evaluates it several times",
                cost="each evaluation is a release of its own, and only one is accounted",
                remedy="use an optimizer of first order such as SGD or AdamW",
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        strangers = [p for p in parameters if p.requires_grad and id(p) not in covered]
        if strangers:
            shapes = ", ".join(str(tuple(p.shape)) for p in strangers[:5])
            raise GuaranteeError(
                must="every parameter that an optimizer trains belongs to the LightningModule",
                found=f"{type(optimizer).__name__} holds {len(strangers)} others, shapes {shapes}",
                cost="gradients that nothing clips",
                remedy="assign the module that owns them to an attribute of the LightningModule",
            )
        held.update(map(id, parameters))
    idle = [name for key, name in covered.items() if key not in held]
    if idle:
        warnings.warn(
            f"{len(idle)} trainable parameters are in no optimizer ({', '.join(idle[:3])}…): their "
            "gradients count towards clip_norm all the same. Freeze them with "
            "requires_grad_(False).",
            stacklevel=2,
        )


def _refuse_two(trainer: Any, callback: Callback) -> None:
    others = [
        c for c in trainer.callbacks if c is not callback and c.state_key == callback.state_key
    ]
    if others:
        raise ConfigurationError(
            must="a trainer has one DifferentialPrivacy callback",
            found=f"{len(others) + 1} of them",
            cost="two mechanisms on one gradient, and an ε that describes neither",
            remedy="keep one; see also what configure_callbacks returns",
        )


def _refuse_accumulation(trainer: Any) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise accumulation_refused(trainer.accumulate_grad_batches)
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            most = max(callback.scheduling.values())
            if most > 1:
                raise accumulation_refused(most)


def _refuse_precision(trainer: Any) -> None:
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UnsupportedOperationError(
            must="every private step is taken, whatever the gradients are",
            found=f'precision="{trainer.precision}", whose gradient scaler skips steps',
            cost="which steps are skipped depends on the data, and no ε covers that",
            remedy='use precision="bf16-mixed" or "32-true"',
        )
    # Before Lightning converts the module to a precision that is refused later on.
    precision_slack_for(trainer.precision)


def _refuse_searches(trainer: Any) -> None:
    for callback in trainer.callbacks:
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise UnsupportedOperationError(
                must="every training step of a private fit is planned",
                found=f"{type(callback).__name__}, which trains a number of steps and rolls back",
                cost="releases that the plan does not know: rolling back does not unspend them",
                remedy="search on public data, or compare several private fits, whose ε add up",
            )


def state_missing(steps: int) -> GuaranteeError:
    """The refusal of a checkpoint of whose steps nothing private is known.

    Args:
        steps: The checkpoint's ``global_step``.

    Returns:
        The error, to be raised.
    """
    return GuaranteeError(
        must="a checkpoint to resume from holds the state of DifferentialPrivacy",
        found=f"{steps} training steps, and no such state",
        cost="steps that were made without privacy, or spent budget that is not counted",
        remedy="resume from a checkpoint of a private fit; to start from weights that public "
        "data made, load them with load_from_checkpoint and fit without ckpt_path",
    )


def warn_restarted(trainer: Any) -> None:
    """Say that a job which was started again, and goes on from nothing, is another run.

    Args:
        trainer: The trainer of the fit, its checkpoint loaded if there is one.
    """
    found = [f"{name}={os.environ[name]}" for name in _RESTARTS if os.environ.get(name)]
    again = [entry for entry in found if not entry.endswith("=0")]
    if again and trainer.ckpt_path is None:
        warnings.warn(
            f"This job was started again ({', '.join(again)}), and the fit goes on from no "
            "checkpoint: it is a run of its own, whose ε does not hold what the earlier ones have "
            "spent. Pass fit(..., ckpt_path=newest_checkpoint(directory)); a PrivacyLedger adds up "
            "what all have spent.",
            stacklevel=2,
        )


def warn_compiled(module: nn.Module) -> None:
    """Say that compiled modules train without their compiled code.

    Args:
        module: The module to be trained.
    """
    compiled = [name or "the module" for name, part in module.named_modules() if _is_compiled(part)]
    if compiled:
        warnings.warn(
            f"torch.compile is not used in private training steps ({', '.join(compiled[:3])}): "
            "compiled code hides the operations whose per-example gradients are needed. "
            "Validation and prediction use it as before.",
            stacklevel=2,
        )


def _is_compiled(part: nn.Module) -> bool:
    names = ("_compiled_call_impl", "_compiler_ctx")
    return hasattr(part, "_orig_mod") or any(getattr(part, n, None) is not None for n in names)
