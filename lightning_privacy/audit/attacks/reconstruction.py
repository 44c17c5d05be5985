"""Rebuild inputs from a gradient: what a single update gives away, raw, clipped or noised.

The gradients are those of one example, or of one private step, by parameter name. Clipping scales a
gradient and hides nothing of its direction; only noise does. `lightning_privacy.clipping` and
`PrivateStep` make the clipped and the noised ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    LossOfInput = Callable[[nn.Module, Tensor], Tensor]


def recover_tokens(embedding_gradient: Tensor, count: int) -> Tensor:
    """The tokens that a text most likely held, from the gradient of its embedding table.

    Only the rows of tokens that occur have a gradient. (Boenisch et al. 2023, arXiv 2112.02918;
    Melis et al. 2019, arXiv 1805.04049.)

    Args:
        embedding_gradient: ``[V, D]``.
        count: How many different tokens to name, from 1 to V.

    Returns:
        ``[count]`` token ids, the surest first.

    Raises:
        ConfigurationError: The count is outside its range.
    """
    count = whole_number(
        "count", count, at_least=1, cost="no token", remedy="pass the length of the text"
    )
    if count > len(embedding_gradient):
        raise ConfigurationError(
            must="count is at most the size of the vocabulary",
            found=f"count={count} of {len(embedding_gradient)} tokens",
            cost="tokens named twice",
            remedy="pass the length of the text",
        )
    return embedding_gradient.float().norm(dim=1).topk(count).indices


def token_recovery(recovered: Tensor, tokens: Tensor) -> float:
    """Share of a text's different tokens that were recovered.

    Args:
        recovered: Token ids named by an attack.
        tokens: Token ids of the text.

    Returns:
        A share in [0, 1].
    """
    true = set(tokens.flatten().tolist())
    return len(true & set(recovered.flatten().tolist())) / max(1, len(true))


def invert_gradient(
    module: nn.Module,
    loss: LossOfInput,
    gradient: Mapping[str, Tensor],
    start: Tensor,
    *,
    steps: int = 300,
    learning_rate: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Search an input whose gradient points where the observed one does.

    Minimises one minus the cosine of the two gradients by Adam, which a scale does not change: the
    attack does not care about clipping. (Geiping et al. 2020, arXiv 2003.14053, without its prior.)

    Args:
        module: The model at the observed step; twice differentiable (no plain ReLU networks).
        loss: ``loss(module, input)`` gives the scalar loss, with labels that the attacker knows.
        gradient: The observed gradient by parameter name.
        start: Where to begin, of the input's shape, for instance noise.
        steps: Number of steps, >= 1.
        learning_rate: Of Adam.
        bounds: Least and largest value of the input.

    Returns:
        The input found, of the shape of ``start``.

    Raises:
        ConfigurationError: The gradient names no parameter of the module, or ``steps`` is not
            >= 1.
    """
    steps = whole_number("steps", steps, at_least=1, cost="no search", remedy="pass some hundred")
    parameters = {n: p for n, p in module.named_parameters() if n in gradient}
    if not parameters:
        raise ConfigurationError(
            must="the gradient is given by names of the module's parameters",
            found=f"the names {sorted(gradient)[:5]}",
            cost="a search for nothing",
            remedy="pass {name: parameter.grad for name, parameter in module.named_parameters()}",
        )
    aim = torch.cat([gradient[name].flatten() for name in parameters]).to(start)
    guess = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss(module, guess)
        own = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
        flat = torch.cat([part.flatten() for part in own])
        distance = 1 - nn.functional.cosine_similarity(flat, aim, dim=0)
        (guess.grad,) = torch.autograd.grad(distance, guess)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(*bounds)
    return guess.detach()


def peak_signal_to_noise(found: Tensor, true: Tensor, span: float = 1.0) -> float:
    """PSNR in decibels of images or spectrograms; above some 20 the content shows.

    Args:
        found: What was rebuilt.
        true: What it should be, of the same shape.
        span: Range of the values.

    Returns:
        Decibels.
    """
    return float(peak_signal_noise_ratio(found.float(), true.float(), data_range=span))


def structural_similarity(found: Tensor, true: Tensor, span: float = 1.0) -> float:
    """SSIM of images or spectrograms, 1 for equal ones.

    Args:
        found: ``[B, C, H, W]`` what was rebuilt.
        true: What it should be, of the same shape.
        span: Range of the values.

    Returns:
        A number in [−1, 1].
    """
    value = structural_similarity_index_measure(
        found.float(), true.float(), data_range=span, kernel_size=7, sigma=1.0
    )
    assert isinstance(value, Tensor)
    return float(value)
