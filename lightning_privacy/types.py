"""The vocabulary of the package, and what counts as a legal number in it."""

from __future__ import annotations

import math
import numbers
from enum import StrEnum
from typing import Literal

from lightning_privacy.errors import ConfigurationError

ClippingKind = Literal["flat", "per_layer", "automatic"]
LossReduction = Literal["mean", "sum"]
AccountantName = Literal["pld", "prv", "rdp"]
UserSampling = Literal["users", "examples"]
UserUpdate = Literal["mean", "local_steps"]

CLIPPING_KINDS: tuple[ClippingKind, ...] = ("flat", "per_layer", "automatic")
LOSS_REDUCTIONS: tuple[LossReduction, ...] = ("mean", "sum")
ACCOUNTANT_NAMES: tuple[AccountantName, ...] = ("pld", "prv", "rdp")
USER_SAMPLINGS: tuple[UserSampling, ...] = ("users", "examples")
USER_UPDATES: tuple[UserUpdate, ...] = ("mean", "local_steps")


class PrivacyUnit(StrEnum):
    """What one neighbour differs in: a single example, or all the examples of one user."""

    EXAMPLE = "example"
    USER = "user"


class NeighbouringRelation(StrEnum):
    """Which pairs of data sets the guarantee speaks about.

    ``ADD_OR_REMOVE``: one data set has one unit more; the number of units is private.
    ``ZERO_OUT``: one unit is replaced by a null record; the number of units is public.
    For a Poisson-subsampled Gaussian both have the same ε (the same dominating pair).
    """

    ADD_OR_REMOVE = "add_or_remove"
    ZERO_OUT = "zero_out"


def real_number(name: str, value: object, within: str, *, cost: str, remedy: str) -> float:
    """Returns ``value`` as a float, or refuses it: only finite real numbers inside the range pass.

    Args:
        name: The argument's name, for the message.
        value: What was given. Booleans, strings, NaN and infinities are refused.
        within: The legal interval, as ``"(0, 1]"`` or ``"[0, inf)"``.
        cost: What a wrong value would cost.
        remedy: What to pass instead.

    Returns:
        The value as a Python float.

    Raises:
        ConfigurationError: The value is no number, not finite, or outside the interval.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and _contains(within, number):
            return number
    raise ConfigurationError(
        must=f"`{name}` must be a finite number in {within}",
        found=f"`{name}` = {value!r}",
        cost=cost,
        remedy=remedy,
    )


def _contains(interval: str, number: float) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def whole_number(name: str, value: object, *, cost: str, remedy: str, at_least: int) -> int:
    """Returns ``value`` as an int, or refuses it: only whole numbers from ``at_least`` on pass.

    Args:
        name: The argument's name, for the message.
        value: What was given. Booleans, and floats even when whole, are refused.
        cost: What a wrong value would cost.
        remedy: What to pass instead.
        at_least: Inclusive lower limit.

    Returns:
        The value as a Python int.

    Raises:
        ConfigurationError: The value is no whole number or too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < at_least:
        raise ConfigurationError(
            must=f"`{name}` must be a whole number >= {at_least}",
            found=f"`{name}` = {value!r}",
            cost=cost,
            remedy=remedy,
        )
    return int(value)


def one_of(name: str, value: object, choices: tuple[str, ...], *, cost: str, remedy: str) -> None:
    """Refuses ``value`` unless it is one of the named choices.

    Args:
        name: The argument's name, for the message.
        value: What was given.
        choices: The legal names.
        cost: What a wrong value would cost.
        remedy: What to pass instead.

    Raises:
        ConfigurationError: The value is none of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(
            must=f"`{name}` must be one of {', '.join(repr(str(choice)) for choice in choices)}",
            found=f"`{name}` = {value!r}",
            cost=cost,
            remedy=remedy,
        )
