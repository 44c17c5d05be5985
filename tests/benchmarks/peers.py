"""Other ways to make the same private steps, to be measured beside this package's.

Each class has the constructor ``(model, losses, batch)`` and a method ``step``: one private step of
AdamW on the batch, with noise and clip norm of 1. Opacus comes with the package's requirements; the
others are measured where they can be imported::

    pip install opake==0.16.1               # JetBrains Research
    export PYTHONPATH=fast-differential-privacy:$PYTHONPATH    # a clone of awslabs' repository

opake 0.16.1 cannot account on Python 3.11; only its clipping and noise are used here. fastDP leaves
out parameters of layers that it does not know, such as RMSNorm's; they are frozen in its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[..., Tensor]
Batch = list[Tensor]

SIGMA = CLIP_NORM = 1.0
# Steps that fastDP's accountant is told of; it never stops a run.
_STEPS = 1000


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what is trainable, as all modes have it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


class OpacusHooks:
    """Opacus: hooks on layers that instantiate the gradient of each example."""

    def __init__(self, model: nn.Module, losses: Losses, batch: Batch) -> None:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.losses, self.batch = losses, batch
        self.model = GradSampleModule(model, strict=False)
        self.optimizer = DPOptimizer(optimizer_of(model), **_opacus_options(batch))

    def step(self) -> None:
        """See the module."""
        self.losses(self.model, self.batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class OpacusGhost:
    """Opacus: ghost clipping, in two backward passes."""

    def __init__(self, model: nn.Module, losses: Losses, batch: Batch) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self.losses, self.batch = losses, batch
        self.model = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=CLIP_NORM, use_ghost_clipping=True, strict=False
        )
        self.optimizer = DPOptimizerFastGradientClipping(
            optimizer_of(model), **_opacus_options(batch)
        )
        self.criterion = DPLossFastGradientClipping(
            self.model, self.optimizer, _Given(), loss_reduction="mean"
        )

    def step(self) -> None:
        """See the module."""
        losses = self.losses(self.model, self.batch)
        self.criterion(losses, losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Opake:
    """opake: gradients of single examples by `torch.func`, vectorised over the batch."""

    def __init__(self, model: nn.Module, losses: Losses, batch: Batch) -> None:
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.patches import apply_model_patches, apply_runtime_patches
        from opake.random import key

        apply_runtime_patches()
        apply_model_patches(model)
        self.batch, self.optimizer = batch, optimizer_of(model)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(values: dict[str, Tensor], *row: Tensor) -> Tensor:
            def call(*arguments: Any, **named: Any) -> Any:
                return torch.func.functional_call(model, values, arguments, named)

            return losses(call, [part.unsqueeze(0) for part in row]).mean()

        self.clipped, self.clip_state = clipped_grad(
            loss,
            clipping_norm=CLIP_NORM,
            batch_argnums=tuple(range(1, 1 + len(batch))),
            normalize_by=len(batch[0]),
        )
        self.noised, self.noise_state = gaussian_noise(noise_multiplier=SIGMA, key=key(0))

    def step(self) -> None:
        """See the module."""
        values = {name: p.detach() for name, p in self.parameters.items()}
        clipped, self.clip_state = self.clipped(values, *self.batch, state=self.clip_state)
        noised, self.noise_state = self.noised(clipped, self.noise_state)
        for name, parameter in self.parameters.items():
            parameter.grad = noised.pytree[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class FastDP:
    """fastDP: book-keeping in one backward, norms by the cheaper of two forms."""

    def __init__(self, model: nn.Module, losses: Losses, batch: Batch) -> None:
        from fastDP import PrivacyEngine

        self.model, self.losses, self.batch = model, losses, batch
        self.optimizer = optimizer_of(model)
        PrivacyEngine(
            model,
            batch_size=len(batch[0]),
            sample_size=_STEPS * len(batch[0]),
            epochs=1,
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP_NORM,
            clipping_fn="Abadi",
        ).attach(self.optimizer)

    def step(self) -> None:
        """See the module."""
        self.losses(self.model, self.batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class ExampleLoop:
    """No library: one example after the other."""

    def __init__(self, model: nn.Module, losses: Losses, batch: Batch) -> None:
        self.model, self.losses, self.batch = model, losses, batch
        self.optimizer = optimizer_of(model)

    def step(self) -> None:
        """See the module."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        totals = [torch.zeros_like(p) for p in parameters]
        rows = len(self.batch[0])
        for row in range(rows):
            self.losses(self.model, [t[row : row + 1] for t in self.batch]).mean().backward()
            norm = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters])
            )
            factor = float((CLIP_NORM / norm).clamp(max=1.0))
            for total, parameter in zip(totals, parameters, strict=True):
                total.add_(parameter.grad, alpha=factor)
                parameter.grad = None
        for total, parameter in zip(totals, parameters, strict=True):
            parameter.grad = (total + SIGMA * CLIP_NORM * torch.randn_like(total)) / rows
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Given(nn.Module):
    """A criterion for losses that the model computed itself."""

    reduction = "mean"

    def forward(self, losses: Tensor, _: Tensor) -> Tensor:
        return losses if self.reduction == "none" else losses.mean()


def _opacus_options(batch: Batch) -> dict[str, Any]:
    return {
        "noise_multiplier": SIGMA,
        "max_grad_norm": CLIP_NORM,
        "expected_batch_size": len(batch[0]),
    }


PEERS: dict[str, type] = {
    "opacus hooks": OpacusHooks,
    "opacus ghost": OpacusGhost,
    "example loop": ExampleLoop,
}
if find_spec("opake") is not None:
    PEERS["opake"] = Opake
if find_spec("fastDP") is not None:
    PEERS["fastDP"] = FastDP
