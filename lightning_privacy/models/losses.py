"""Cross entropies of language models, per example, without float32 scores of a whole batch.

Scores over a large vocabulary are the largest tensor of a language model, and autograd's own cross
entropy keeps two copies of them in float32. Here they are widened piece by piece. Each row of a
result depends on that row alone.

Legend: ``B`` rows, ``T`` positions, ``V`` vocabulary, ``N = B T``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

IGNORED_LABEL = -100

# Scores that are held in float32 at a time: 128 MiB.
_PIECE = 2**25


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute each example's mean loss per predicted token.

    Row i depends on row i alone: it is divided by its own number of labels. (The mean over all
    labels of a batch, usual for language models, divides by what the *other* rows hold, and then
    one example can move another one's gradient.)

    Args:
        logits: Scores [B, T, V]; position t predicts the token at t + 1.
        labels: Tokens [B, T], −100 where nothing is to be predicted.

    Returns:
        Cross entropies [B] in nats per token, float32 or better; 0 for a row without labels.
    """
    targets = _next_tokens(labels)
    losses: Any = _TokenLosses.apply(logits.flatten(0, 1), targets.flatten())
    return _mean_by_row(losses, targets)


def frozen_head_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute what :func:`example_losses` does, of ``hidden @ weight.T``, without these scores.

    They exist piece by piece only, in any precision, because the gradient with respect to
    ``hidden`` is computed together with the loss. The weight gets no gradient: it has to be frozen.

    Args:
        hidden: States [B, T, d]; position t predicts the token at t + 1.
        weight: The output layer's frozen weight [V, d].
        labels: Tokens [B, T], −100 where nothing is to be predicted.

    Returns:
        Cross entropies [B] in nats per token, float32 or better; 0 for a row without labels.

    Raises:
        ValueError: If the weight is trainable; its gradient would be lost.
    """
    if weight.requires_grad:
        raise ValueError("the weight of the output layer is trainable: use example_losses")
    targets = _next_tokens(labels)
    learning = torch.is_grad_enabled() and hidden.requires_grad
    losses: Any = _FrozenHeadLosses.apply(hidden.flatten(0, 1), weight, targets.flatten(), learning)
    return _mean_by_row(losses, targets)


def _next_tokens(labels: Tensor) -> Tensor:
    # Shifting the labels, not the scores, saves a copy of the largest tensor of the model.
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def _mean_by_row(losses: Tensor, targets: Tensor) -> Tensor:
    counts = (targets != IGNORED_LABEL).sum(dim=1).clamp(min=1)
    return losses.view(targets.shape).sum(dim=1) / counts


class _TokenLosses(torch.autograd.Function):
    """Cross entropy [N] of scores [N, V]; a position depends on that position alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normaliser = _widened(logits[:0]).new_empty(len(logits))
        losses = torch.empty_like(normaliser)
        for piece in _pieces(len(logits), logits.shape[1]):
            wide = _widened(logits[piece])
            normaliser[piece] = wide.logsumexp(dim=1)
            losses[piece] = _losses(wide, normaliser[piece], targets[piece])
        ctx.save_for_backward(logits, normaliser, targets)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, normaliser, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for piece in _pieces(len(logits), logits.shape[1]):
            wide = _widened(logits[piece], copy=True)
            own = _score_gradient(wide, normaliser[piece], targets[piece])
            gradient[piece] = own.mul_(grad[piece, None])
        return gradient, None


class _FrozenHeadLosses(torch.autograd.Function):
    """Cross entropy [N] of scores ``hidden [N, d] @ weight.T``, and its gradient, in one pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learning: bool
    ) -> Tensor:
        losses = _widened(hidden[:0]).new_empty(len(hidden))
        gradient = torch.empty_like(hidden) if learning else None
        for piece in _pieces(len(hidden), len(weight)):
            wide = _widened(F.linear(hidden[piece].to(weight.dtype), weight), copy=True)
            normaliser = wide.logsumexp(dim=1)
            losses[piece] = _losses(wide, normaliser, targets[piece])
            if gradient is not None:
                own = _score_gradient(wide, normaliser, targets[piece])
                gradient[piece] = (own.to(weight.dtype) @ weight).to(hidden.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # The product is taken in the wider type of the two, and rounded once.
        scaled = torch.mul(gradient, grad[:, None], out=torch.empty_like(gradient))
        return scaled, None, None, None


def _pieces(rows: int, width: int) -> Iterator[slice]:
    size = max(1, _PIECE // max(1, width))
    return (slice(start, start + size) for start in range(0, rows, size))


def _widened(tensor: Tensor, *, copy: bool = False) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)


def _losses(wide: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    chosen = wide.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    # By selection: a score that is not finite must not leave a position that is ignored.
    return (normaliser - chosen).masked_fill(targets == IGNORED_LABEL, 0.0)


def _score_gradient(wide: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """Of each position's loss with respect to its scores, in the place of ``wide [M, V]``."""
    probabilities = wide.sub_(normaliser[:, None]).exp_()
    ones = torch.ones_like(normaliser)[:, None]
    probabilities.scatter_add_(1, targets.clamp(min=0)[:, None], -ones)
    return probabilities.masked_fill_((targets == IGNORED_LABEL)[:, None], 0.0)
