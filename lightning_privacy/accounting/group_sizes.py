"""How much noise user-level privacy needs, drawing users or drawing their examples.

Both ways are compared at the same cost, examples whose gradients one step computes on average
(arXiv 2407.07737). With group size G, either examples are drawn, out of at most G of each user; or
users are drawn, and the mean over G examples of each is clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lightning_privacy.accounting.accountants import checked_delta
from lightning_privacy.accounting.calibrate import noise_multiplier_for
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LEAST_USERS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFacts:
    """What is publicly known about the users of a run.

    Args:
        users: Number of users, >= 2.
        examples_per_user: Examples of a typical user, >= 1: the median, from public knowledge.
        similarity: Share s of an example's squared gradient norm that all examples of its user have
            in common, in [0, 1]; to be measured on public data. The mean over G examples then has a
            norm of sqrt(s + (1 - s) / G) times that of one example.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    users: int
    examples_per_user: float
    similarity: float

    def __post_init__(self) -> None:
        """Checks the three numbers."""
        whole_number(
            "users",
            self.users,
            at_least=2,
            cost="a comparison for nobody",
            remedy="pass the number of users",
        )
        for name, within in (("examples_per_user", "[1, inf)"), ("similarity", "[0, 1]")):
            real_number(
                name,
                getattr(self, name),
                within,
                cost="a recommendation for other users than these",
                remedy="pass what is publicly known, or measured on public data",
            )

    def examples(self, group_size: int) -> float:
        """Number of examples that take part, where every user has the typical number.

        Args:
            group_size: G >= 1.

        Returns:
            users * min(G, examples_per_user).
        """
        return self.users * min(group_size, self.examples_per_user)

    def norm_of_mean(self, group_size: int) -> float:
        """Norm of the mean over the examples of a user, relative to that of one example.

        Args:
            group_size: G >= 1.

        Returns:
            A number in (0, 1].
        """
        count = min(group_size, self.examples_per_user)
        return math.sqrt(self.similarity + (1 - self.similarity) / count)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSizeRow:
    """What one group size needs; None where it is not possible.

    Attributes:
        group_size: G.
        example_rate: Rate at which examples are drawn.
        example_noise: Noise multiplier for drawn examples, over an example's clip norm.
        users_per_step: Users that a step draws on average.
        user_noise: Noise multiplier for drawn users, over a user's clip norm.
        by_examples: Standard deviation, per coordinate, of the noise on the mean gradient of a step
            that draws examples, in clip norms of one example.
        by_users: The same for a step that draws users, whose clip norm is smaller by
            `UserFacts.norm_of_mean`.
    """

    group_size: int
    example_rate: float | None
    example_noise: float | None
    users_per_step: float | None
    user_noise: float | None
    by_examples: float | None
    by_users: float | None


def compare_group_sizes(
    facts: UserFacts,
    *,
    examples_per_step: float,
    steps: int,
    epsilon: float,
    delta: float,
    group_sizes: Sequence[int],
    examples: Callable[[int], float] | None = None,
) -> tuple[GroupSizeRow, ...]:
    """Returns the predicted noise of both ways to draw, for each group size.

    Args:
        facts: What is publicly known.
        examples_per_step: Gradients of examples that a step computes on average, > 0.
        steps: Number of private steps, >= 1.
        epsilon: The budget ε > 0, for a user.
        delta: δ in (0, 1).
        group_sizes: Group sizes, each >= 1; at least one.
        examples: How many examples take part at a group size, where more is known than `facts`
            says. If it was counted on private data, what is returned is private.

    Returns:
        One row for each group size.

    Raises:
        ConfigurationError: A value is outside its range.
    """
    checked_delta(delta)
    batch = real_number(
        "examples_per_step",
        examples_per_step,
        "(0, inf)",
        cost="a step that computes nothing",
        remedy="pass the examples whose gradients one step computes on average",
    )
    if not group_sizes:
        raise ConfigurationError(
            must="`group_sizes` must name at least one group size",
            found="none",
            cost="an empty table",
            remedy="pass for instance [1, 2, 4, 8]",
        )
    counted = facts.examples if examples is None else examples
    rows = []
    for group_size in group_sizes:
        size = whole_number(
            "group_sizes", group_size, at_least=1, cost="users of nothing", remedy="pass sizes >= 1"
        )
        rate, drawn = batch / counted(size), batch / min(size, facts.examples_per_user)
        noise = partial(noise_multiplier_for, epsilon=epsilon, delta=delta, steps=steps)
        by_example = noise(sample_rate=rate, group_size=size) if rate <= 1 else None
        possible = _LEAST_USERS <= drawn <= facts.users
        by_user = noise(sample_rate=drawn / facts.users) if possible else None
        rows.append(_row(facts, batch, size, rate, drawn, by_example, by_user))
    return tuple(rows)


def _row(
    facts: UserFacts,
    batch: float,
    size: int,
    rate: float,
    drawn: float,
    by_example: float | None,
    by_user: float | None,
) -> GroupSizeRow:
    norm = facts.norm_of_mean(size)
    return GroupSizeRow(
        group_size=size,
        example_rate=None if by_example is None else rate,
        example_noise=by_example,
        users_per_step=None if by_user is None else drawn,
        user_noise=by_user,
        by_examples=None if by_example is None else by_example / batch,
        by_users=None if by_user is None else by_user / drawn * norm,
    )


def recommended(
    rows: Sequence[GroupSizeRow], median: float
) -> tuple[GroupSizeRow | None, GroupSizeRow | None]:
    """Returns the rows that the published rules choose (arXiv 2407.07737).

    Args:
        rows: What `compare_group_sizes` returned.
        median: Median number of examples of a user.

    Returns:
        For drawn examples the group size nearest to the median; for drawn users the one with the
        least predicted noise. None where no row is possible.
    """
    by_example = [row for row in rows if row.by_examples is not None]
    by_user = [row for row in rows if row.by_users is not None]
    return (
        min(by_example, key=lambda row: abs(math.log(row.group_size / median)), default=None),
        min(by_user, key=lambda row: row.by_users or math.inf, default=None),
    )
