"""What a tier is owed: from what is known of it, measured on public data or declared, to an ε."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Source = Literal["public", "declared"]
_SOURCES: tuple[Source, ...] = ("public", "declared")
_ASPECTS = ("volume", "kinds", "correlation", "exposure")
_SENSITIVE = (
    re.compile(r"\b\d{4,}\b"),
    re.compile(r"\b[\w.]+@[\w.]+\b"),
    re.compile(r"\b(?:street|phone|password|account|salary|diagnos\w+)\b", re.IGNORECASE),
)
_MANY_EXAMPLES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class TierMeasures:
    """How sensitive the users of one tier are, each aspect from 0 (not at all) to 1.

    Args:
        volume: How much they contribute.
        kinds: How sensitive the kinds of information are that they contribute.
        correlation: How much one of their examples tells of the others.
        exposure: How easily they are recognised, or how much they have to lose.
        source: "public" (measured on people who are not protected by the run) or "declared".

    Raises:
        ConfigurationError: An aspect is outside [0, 1].
        UnsupportedOperationError: It was measured on the protected users.
    """

    volume: float
    kinds: float
    correlation: float
    exposure: float
    source: str

    def __post_init__(self) -> None:
        """Refuses measurements of protected users."""
        for name in _ASPECTS:
            real_number(
                name,
                getattr(self, name),
                "[0, 1]",
                cost="a score without a scale",
                remedy="rate each aspect from 0 to 1",
            )
        if self.source not in _SOURCES:
            raise UnsupportedOperationError(
                must="tiers are assessed on public or declared data",
                found=f"source={self.source!r}",
                cost="targets that depend on the protected users: clip norms and rates, which are "
                "published, would tell about them",
                remedy="measure on people who are not in the training data, or declare the values",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityPolicy:
    """Maps scores to target ε: the weighted mean of the aspects, on a logarithmic scale of ε.

    A tier of score 0 is owed ``loosest``, one of score 1 ``strictest``.

    Args:
        strictest: Smallest ε, > 0.
        loosest: Largest ε, at least ``strictest``: the headline of the run.
        volume: Weight of that aspect, >= 0.
        kinds: The same.
        correlation: The same.
        exposure: The same; not all are 0.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    strictest: float
    loosest: float
    volume: float = 1.0
    kinds: float = 1.0
    correlation: float = 1.0
    exposure: float = 1.0

    def __post_init__(self) -> None:
        """Checks ranges."""
        for field in fields(self):
            within = "[0, inf)" if field.name in _ASPECTS else "(0, inf)"
            real_number(
                field.name,
                getattr(self, field.name),
                within,
                cost="a target without meaning",
                remedy="pass weights >= 0 and two positive ε",
            )
        if self.strictest > self.loosest or not any(getattr(self, name) for name in _ASPECTS):
            raise ConfigurationError(
                must="`strictest` is at most `loosest`, and some weight is above 0",
                found=f"strictest={self.strictest}, loosest={self.loosest}",
                cost="sensitive users protected less than others",
                remedy="for example SensitivityPolicy(strictest=1.0, loosest=8.0)",
            )

    def score(self, measures: TierMeasures) -> float:
        """Returns the weighted mean of the aspects.

        Args:
            measures: Of one tier.

        Returns:
            A number in [0, 1].
        """
        weights = [getattr(self, name) for name in _ASPECTS]
        values = [getattr(measures, name) for name in _ASPECTS]
        return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)

    def targets(self, measures: Mapping[str, TierMeasures]) -> dict[str, float]:
        """Returns the target ε of each tier.

        Args:
            measures: By tier.

        Returns:
            ε by tier, from ``strictest`` to ``loosest``.
        """
        span = math.log(self.strictest / self.loosest)
        return {
            name: self.loosest * math.exp(span * self.score(known))
            for name, known in measures.items()
        }


def measured_texts(
    texts: Sequence[Sequence[str]], *, exposure: float, source: str = "public"
) -> TierMeasures:
    """Measures a tier on the texts of public people who are like its users.

    Args:
        texts: For each person the texts, at least one.
        exposure: Declared, in [0, 1]: no text says it.
        source: Where the texts come from: "public".

    Returns:
        Volume (median number of texts, on a logarithmic scale up to 100), kinds (share of texts
        with a number of four digits, an address or a telling word), correlation (share of a text's
        words that another text of the same person has, too), and the exposure.

    Raises:
        ConfigurationError: There is no text.
        UnsupportedOperationError: They are the protected users' own.
    """
    people = [list(person) for person in texts if len(person)]
    if not people:
        raise ConfigurationError(
            must="there is a person with a text",
            found="none",
            cost="an assessment of nothing",
            remedy="pass texts of public people, or declare TierMeasures",
        )
    counts = sorted(map(len, people))
    every = [text for person in people for text in person]
    telling = sum(any(pattern.search(text) for pattern in _SENSITIVE) for text in every)
    overlaps = [overlap for person in people for overlap in _overlaps(person)]
    return TierMeasures(
        volume=min(1.0, math.log(counts[len(counts) // 2]) / math.log(_MANY_EXAMPLES)),
        kinds=telling / len(every),
        correlation=sum(overlaps) / len(overlaps),
        exposure=exposure,
        source=source,
    )


def _overlaps(person: Sequence[str]) -> list[float]:
    words = [set(text.lower().split()) for text in person]
    found = []
    for number, own in enumerate(words):
        others: set[str] = set().union(*(w for n, w in enumerate(words) if n != number))
        found.append(len(own & others) / max(1, len(own)))
    return found
