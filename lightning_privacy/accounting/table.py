"""What a configuration would cost at several batch sizes, without training anything."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_privacy.accounting.accountants import epsilon as epsilon_of
from lightning_privacy.accounting.calibrate import noise_multiplier_for
from lightning_privacy.accounting.events import GaussianRelease
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import AccountantName, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

_OTHER_STEPS = "an ε for another number of steps than will run"


def plan_table(  # noqa: PLR0913 (the command line's options)
    *,
    dataset_size: int,
    batch_sizes: Sequence[float],
    epochs: float | None = None,
    steps: int | None = None,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accountant: AccountantName = "pld",
    precision_slack: float = 1e-4,
    group_size: int = 1,
) -> tuple[dict[str, float | int], ...]:
    """Returns what a configuration would cost at several expected batch sizes.

    The rows agree with what `PrivacyPlan` says of the same numbers.

    Args:
        dataset_size: Number of units, >= 1.
        batch_sizes: Expected batch sizes, each > 0 and at most ``dataset_size``; at least one.
        epochs: Passes over the data set, > 0; a pass is round(1 / sample rate) steps, and the
            steps are rounded up.
        steps: Number of private steps >= 1, instead of ``epochs``.
        delta: δ in (0, 1).
        epsilon: Budget: each row has the noise multiplier that it needs.
        noise_multiplier: Noise > 0, instead of ``epsilon``: each row has the ε that it costs.
        accountant: Which accountant to ask.
        precision_slack: τ in [0, 1), relative excess of a clipped contribution through rounding.
        group_size: Most parts of one unit, >= 1, each drawn on its own.

    Returns:
        One row for each batch size with the keys "expected_batch_size", "sample_rate", "steps",
        "noise_multiplier", "epsilon", "delta" and "noise_to_batch" (noise multiplier over
        expected batch size: the noise on the mean gradient, in clip norms).

    Raises:
        ConfigurationError: A value is outside its range, or not exactly one of ``epochs`` and
            ``steps``, or of ``epsilon`` and ``noise_multiplier``, was given.
    """
    _exactly_one("epochs", epochs, "steps", steps)
    _exactly_one("epsilon", epsilon, "noise_multiplier", noise_multiplier)
    size, slack = _checked_size(dataset_size), 1 + _checked_slack(precision_slack)
    rows: list[dict[str, float | int]] = []
    for batch in _checked_batches(batch_sizes, size):
        rate = batch / size
        count = _steps(epochs, steps, rate)
        whole = GaussianRelease(
            noise_multiplier=1.0, sample_rate=rate, count=count, group_size=group_size
        )
        if epsilon is not None:
            effective = _noise_for(whole, epsilon, delta, accountant)
        else:
            effective = _checked_noise(noise_multiplier) / slack
        release = replace(whole, noise_multiplier=effective)
        rows.append(
            {
                "expected_batch_size": batch,
                "sample_rate": rate,
                "steps": count,
                "noise_multiplier": effective * slack,
                "epsilon": epsilon_of([release], delta, accountant),
                "delta": delta,
                "noise_to_batch": effective * slack / batch,
            }
        )
    return tuple(rows)


def _noise_for(
    whole: GaussianRelease, epsilon: float, delta: float, accountant: AccountantName
) -> float:
    return noise_multiplier_for(
        epsilon=epsilon,
        delta=delta,
        sample_rate=whole.sample_rate,
        steps=whole.count,
        accountant=accountant,
        group_size=whole.group_size,
    )


def _checked_size(dataset_size: object) -> int:
    return whole_number(
        "dataset_size",
        dataset_size,
        at_least=1,
        cost="another sampling than the accounted one",
        remedy="pass the number of units",
    )


def _checked_slack(precision_slack: object) -> float:
    return real_number(
        "precision_slack",
        precision_slack,
        "[0, 1)",
        cost="rounding errors that are not accounted for",
        remedy="leave it out",
    )


def _checked_batches(batch_sizes: Sequence[float], size: int) -> list[float]:
    if not batch_sizes:
        raise ConfigurationError(
            must="`batch_sizes` must name at least one expected batch size",
            found="none",
            cost="an empty table",
            remedy="pass for instance [256, 512, 1024]",
        )
    return [
        real_number(
            "batch_sizes",
            batch_size,
            f"(0, {size}]",
            cost="a sample rate above 1, or no unit ever drawn",
            remedy="pass expected batch sizes that are at most `dataset_size`",
        )
        for batch_size in batch_sizes
    ]


def _steps(epochs: float | None, steps: int | None, rate: float) -> int:
    if epochs is None:
        remedy = "pass the number of private steps that the run will make"
        return whole_number("steps", steps, at_least=1, cost=_OTHER_STEPS, remedy=remedy)
    remedy = "pass the number of passes over the data set, for instance 3"
    passes = real_number("epochs", epochs, "(0, inf)", cost=_OTHER_STEPS, remedy=remedy)
    return math.ceil(passes * max(1, round(1 / rate)))


def _checked_noise(noise_multiplier: object) -> float:
    return real_number(
        "noise_multiplier",
        noise_multiplier,
        "(0, inf)",
        cost="a training without noise, whose ε is infinite",
        remedy="pass a positive noise multiplier, or `epsilon` instead",
    )


def _exactly_one(first: str, one: object, second: str, other: object) -> None:
    if (one is None) == (other is None):
        raise ConfigurationError(
            must=f"exactly one of `{first}` and `{second}` must be given",
            found="neither" if one is None else "both",
            cost="a table for a run that nobody described",
            remedy=f"pass `{first}` or `{second}`",
        )
