"""The models that `compare` and `ablate` train: one recipe, with a few of its keys changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_privacy.study import Mechanism

_ATTENTION_NOISE = "AttentionNoise"
_BOTH: tuple[Mechanism, ...] = ("clipping", "noise")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What one row of a table changes in the recipe.

    Args:
        name: As the table shows it.
        modalities: What the model reads; None for what the recipe says.
        without: What of the private step is left out, in study mode.
        attention_noise: Whether the recipe's `AttentionNoise` stays.
        epsilon: The budget; None for the recipe's own.
        learning_rate: None for the recipe's own.
        batch_size: Expected examples of a step; None for the recipe's own. With smaller batches as
            many epochs have more steps.
    """

    name: str
    modalities: tuple[str, ...] | None = None
    without: tuple[Mechanism, ...] = ()
    attention_noise: bool = True
    epsilon: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None

    @property
    def private(self) -> bool:
        """Whether its ε is finite."""
        return not self.without

    def change(self, config: Any) -> None:
        """Change a parsed configuration of ``fit``, in place.

        Args:
            config: A namespace of jsonargparse.

        Raises:
            ConfigurationError: The recipe has no such key.
        """
        model = config.get("model.init_args")
        for name in ("modalities", "learning_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if model is None or name not in model:
                raise _not_multimodal(f"a model without `{name}`")
            model[name] = list(value) if isinstance(value, tuple) else value
        if self.epsilon is not None:
            config.privacy.epsilon = self.epsilon
        if self.batch_size is not None:
            config.privacy.expected_batch_size = self.batch_size
        if self.without:
            config.study = {"without": list(self.without), "not_private": True}
        if not self.attention_noise:
            kept = [c for c in config.trainer.callbacks or [] if not is_attention_noise(c)]
            config.trainer.callbacks = kept or None


def compared(
    modalities: Sequence[str],
    epsilons: Sequence[float],
    learning_rate: float | None = None,
    batch_size: int | None = None,
) -> list[Variant]:
    """List the models of the paper's Table 2, and image and sound alone.

    Args:
        modalities: What the recipe's model reads.
        epsilons: Budgets of the private model; with the first one it also reads one modality alone.
        learning_rate: Of the models that are not private; None for the recipe's.
        batch_size: Of the models that are not private; None for the recipe's.

    Returns:
        Non-private models first.
    """
    plain = Variant(
        name="Non-PrivNet",
        without=_BOTH,
        attention_noise=False,
        learning_rate=learning_rate,
        batch_size=batch_size,
    )
    private = [Variant(name="PrivacyPreserveNet", epsilon=value) for value in epsilons]
    return [
        replace(plain, name="Llama baseline (text)", modalities=("text",)),
        plain,
        *_alone(plain, modalities),
        *private,
        *_alone(private[0], modalities),
    ]


def _alone(variant: Variant, modalities: Sequence[str]) -> list[Variant]:
    return [
        replace(variant, name=f"{variant.name}, {name} alone", modalities=(name,))
        for name in modalities
        if name != "text" and len(modalities) > 1
    ]


def ablated(epsilons: Sequence[float]) -> list[Variant]:
    """List the variants of the paper's Table 3.

    Without clipping the absolute noise is that of the full variant. Attention noise earns no ε, so
    that without it the ε is the same.

    Args:
        epsilons: Budgets of the full model.

    Returns:
        For each budget the full model, and three that lack a part.
    """
    parts: list[Variant] = [
        Variant(name="full"),
        Variant(name="without DP noise", without=("noise",)),
        Variant(name="without clipping", without=("clipping",)),
        Variant(name="without attention noise", attention_noise=False),
    ]
    found = []
    for value in epsilons:
        for part in parts:
            # Both are rows of ε = ∞, and without clipping there is one for each size of the noise.
            several = part.without == ("clipping",) and len(epsilons) > 1
            name = f"{part.name}, noise of ε = {value:g}" if several else part.name
            if part.without != ("noise",) or value == epsilons[0]:
                found.append(replace(part, name=name, epsilon=value))
    return found


def is_attention_noise(callback: Any) -> bool:
    """Whether a configured callback is an `AttentionNoise`.

    Args:
        callback: A namespace with ``class_path``.

    Returns:
        Whether it is.
    """
    return str(callback.get("class_path", "")).rpartition(".")[2] == _ATTENTION_NOISE


def budget(variant: Variant) -> float:
    """The ε that a variant is planned for; infinite in study mode.

    Args:
        variant: The variant, with its budget.

    Returns:
        ε > 0.
    """
    return variant.epsilon if variant.private and variant.epsilon else math.inf


def _not_multimodal(found: str) -> ConfigurationError:
    return ConfigurationError(
        must="the recipe's model is a PrivacyPreserveNet",
        found=found,
        cost="rows of a table that all show the same model",
        remedy="start from recipes/multimodal/quick.yaml",
    )
