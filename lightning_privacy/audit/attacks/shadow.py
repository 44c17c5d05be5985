"""Attacks that compare with other models: LiRA and RMIA, and small shadow models trained at once.

Legend: ``K`` models, ``N`` examples, ``Z`` examples of a population that no model was trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

_FEWEST = 2


class ShadowModels:
    """``K`` models of one kind with stacked parameters, evaluated as one by ``torch.func.vmap``.

    Args:
        modules: The models, of one class and size; for small ones only, as all are in memory.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._skeleton = modules[0]
        self.parameters, self.buffers = stack_module_state(modules)

    def outputs(self, inputs: Tensor) -> Tensor:
        """``[K, N, ...]`` outputs of every model for the same inputs, without gradients."""
        with torch.no_grad():
            return self._call(inputs)

    def _call(self, inputs: Tensor) -> Tensor:
        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return functional_call(self._skeleton, (parameters, buffers), (inputs,))

        return vmap(one, randomness="different")(self.parameters, self.buffers)


def train_shadows(
    make_module: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    included: Tensor,
    *,
    steps: int,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
) -> ShadowModels:
    """Train one model for each row of an inclusion table, all at once.

    Each model takes full-batch Adam steps on the mean cross entropy over its own examples. The
    global random state is as before afterwards.

    Args:
        make_module: Makes one model, with initial weights of its own; called ``K`` times.
        inputs: ``[N, ...]`` examples.
        targets: ``[N]`` classes.
        included: ``[K, N]`` booleans: who is trained on whom, best by fair coins.
        steps: Number of steps, >= 1.
        learning_rate: Of Adam, > 0.
        weight_decay: Of AdamW, >= 0.

    Returns:
        The trained models.

    Raises:
        ConfigurationError: The shapes do not fit, or a model has no example.
    """
    steps = whole_number(
        "steps", steps, at_least=1, cost="untrained shadows", remedy="pass some hundred"
    )
    if included.shape[1:] != targets.shape or not bool(included.any(1).all()):
        raise ConfigurationError(
            must="included is [K, N], with at least one example for each model",
            found=f"shape {tuple(included.shape)} for {len(targets)} examples",
            cost="models trained on other examples than the attack believes",
            remedy="draw included with torch.rand(K, N) < 0.5",
        )
    with torch.random.fork_rng(devices=[]):
        models = ShadowModels([make_module().to(inputs.device) for _ in range(len(included))])
        weights = included.to(inputs.dtype) / included.sum(1, keepdim=True)
        optimizer = torch.optim.AdamW(
            list(models.parameters.values()), lr=learning_rate, weight_decay=weight_decay
        )
        expected = targets.expand(len(included), -1)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = models._call(inputs)
            losses = F.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
            # A sum over models: no model's gradient depends on another one.
            (losses * weights).sum().backward()
            optimizer.step()
    return models


def logit_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """φ = log(p / (1 − p)) of the true class, in float64 and without p itself.

    Near normal over models, which a probability is not. (Carlini et al. 2022, arXiv 2112.03570.)

    Args:
        logits: ``[..., N, classes]``.
        targets: ``[N]`` classes.

    Returns:
        ``[..., N]``.
    """
    wide = logits.double()
    index = targets.expand(wide.shape[:-1])[..., None]
    own = wide.gather(-1, index)[..., 0]
    return own - wide.scatter(-1, index, -torch.inf).logsumexp(-1)


def lira_online(
    confidences: Tensor, shadows: Tensor, included: Tensor, *, fixed_variance: bool = True
) -> Tensor:
    """Likelihood ratio of "trained on it" against "not", with shadows of both kinds.

    log N(φ; μ_in, s_in) − log N(φ; μ_out, s_out), with medians for μ. (Carlini et al. 2022, arXiv
    2112.03570, algorithm 1.)

    Args:
        confidences: ``[N]`` `logit_confidence` of the model under attack.
        shadows: ``[K, N]`` the same of the shadow models.
        included: ``[K, N]`` whether a shadow was trained on the example.
        fixed_variance: Whether all examples share one variance for each kind, better with fewer
            than some 64 shadows.

    Returns:
        ``[N]`` scores.

    Raises:
        ConfigurationError: An example has fewer than two shadows of one kind.
    """
    ratio = torch.zeros_like(confidences, dtype=torch.float64)
    for side, sign in ((included, 1.0), (~included, -1.0)):
        mean, spread = _fitted(shadows, side, fixed_variance)
        distance = (confidences.double() - mean) / spread
        ratio += sign * (-0.5 * distance.square() - spread.log())
    return ratio


def lira_offline(
    confidences: Tensor, shadows: Tensor, included: Tensor, *, fixed_variance: bool = True
) -> Tensor:
    """How far above the shadows that were not trained on an example the model's confidence is.

    (φ − μ_out) / s_out; its order is that of the probability Φ of the paper, without the ties at 1.
    The shadows can be trained before the examples are known. (Carlini et al. 2022, section VI.)

    Args:
        confidences: ``[N]`` `logit_confidence` of the model under attack.
        shadows: ``[K, N]`` the same of the shadow models.
        included: ``[K, N]`` whether a shadow was trained on the example.
        fixed_variance: Whether all examples share one variance.

    Returns:
        ``[N]`` scores.

    Raises:
        ConfigurationError: An example has fewer than two shadows that were not trained on it.
    """
    mean, spread = _fitted(shadows, ~included, fixed_variance)
    return (confidences.double() - mean) / spread


def rmia(
    probabilities: Tensor,
    references: Tensor,
    included: Tensor,
    population: Tensor,
    population_references: Tensor,
    *,
    offline_slope: float = 0.3,
    gamma: float = 1.0,
) -> Tensor:
    """Share of a population that an example's likelihood ratio exceeds; few references are enough.

    (Zarifzadeh et al. 2024, arXiv 2312.03262, offline.) The score has as many values as the
    population has examples: it says nothing at false-positive rates below one over that number.

    Args:
        probabilities: ``[N]`` of the true class, by the model under attack.
        references: ``[K, N]`` the same by reference models.
        included: ``[K, N]`` whether a reference was trained on the example; those are left out.
        population: ``[Z]`` probabilities by the model under attack, of examples of nobody.
        population_references: ``[K, Z]`` the same by the references.
        offline_slope: a in [0, 1] of p(x) = ((1 + a) mean + 1 − a) / 2, which stands in for the
            references that were trained on the example.
        gamma: How much larger a ratio has to be, > 0.

    Returns:
        ``[N]`` scores in [0, 1].

    Raises:
        ConfigurationError: An example has no reference that was not trained on it, or an argument
            is outside its range.
    """
    cost = "scores without meaning"
    a = real_number("offline_slope", offline_slope, "[0, 1]", cost=cost, remedy="pass 0.3")
    gamma = real_number("gamma", gamma, "(0, inf)", cost=cost, remedy="pass 1.0")
    _require_shadows(~included, 1)
    outside = (references.double() * ~included).sum(0) / (~included).sum(0)
    ratios = probabilities.double() / (((1 + a) * outside + 1 - a) / 2)
    expected = ((1 + a) * population_references.double().mean(0) + 1 - a) / 2
    others = (population.double() / expected).sort().values
    return torch.searchsorted(others, ratios / gamma) / len(others)


def _fitted(shadows: Tensor, side: Tensor, fixed_variance: bool) -> tuple[Tensor, Tensor]:
    _require_shadows(side, _FEWEST)
    values = shadows.double().masked_fill(~side, torch.nan)
    centre = values.nanmedian(0).values
    size = side.sum(0)
    squares = (values - values.nanmean(0)).square().nansum(0)
    if fixed_variance:
        pooled = squares.sum() / (size - 1).sum()
        return centre, pooled.sqrt().clamp(min=1e-12).expand(centre.shape)
    return centre, (squares / (size - 1)).sqrt().clamp(min=1e-12)


def _require_shadows(side: Tensor, least: int) -> None:
    fewest = int(side.sum(0).min())
    if fewest < least:
        raise ConfigurationError(
            must=f"each example has at least {least} shadow models of the kind",
            found=f"an example with {fewest}",
            cost="a distribution fitted to nothing",
            remedy="train more shadow models, on random halves",
        )
