"""``plan --unit user``: drawing users or their examples, over group sizes, before any training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_privacy.accounting.accountants import delta_warning
from lightning_privacy.accounting.group_sizes import (
    GroupSizeRow,
    UserFacts,
    compare_group_sizes,
    recommended,
)
from lightning_privacy.accounting.quantile import private_quantile
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SIZES = (1, 2, 4, 8, 16, 32, 64)

_DESCRIPTION = """\
Compare two ways to protect users, at the same number of gradients per step:

  examples   draw examples, out of at most G of each user; clip each; count a user's together
  users      draw users; clip the mean gradient over G examples of each

The numbers that you give are taken as public. --counts reads private ones: what is printed then
is private, too, unless --quantile_epsilon spends a part of the budget on a private median.
"""


def print_user_plan(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The options behind ``plan``, ``--unit user`` included.

    Raises:
        ConfigurationError: A number is missing, out of range, or contradicts another.
    """
    options = _parser().parse_args(words)
    median, examples, title = _known(options)
    facts = UserFacts(
        users=options.dataset_size, examples_per_user=median, similarity=options.similarity
    )
    rows = compare_group_sizes(
        facts,
        examples_per_step=options.examples_per_step,
        steps=options.steps,
        epsilon=options.epsilon,
        delta=options.delta,
        group_sizes=options.group_sizes,
        examples=examples,
    )
    if warning := delta_warning(options.delta, options.dataset_size):
        print(warning, file=sys.stderr)
    _print(rows, title)
    _print_rules(rows, median)
    _print_cost(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-privacy plan --unit user",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--unit", choices=("user",), required=True)
    add("--dataset_size", type=int, required=True, metavar="N", help="number of users")
    add("--examples_per_step", type=float, required=True, metavar="B",
        help="gradients of examples that a step computes, on average")  # fmt: skip
    add("--steps", type=int, required=True, help="private steps")
    add("--epsilon", type=float, required=True, help="budget for a user")
    add("--delta", type=float, required=True, help="well below one over the number of users")
    add("--examples_per_user", type=float, metavar="n", help="median, from public knowledge")
    add("--similarity", type=float, default=0.1, metavar="s",
        help="share of an example's squared gradient norm that its user's examples have in common; "
        "measure it on public data (default 0.1, an assumption)")  # fmt: skip
    add("--group_sizes", type=int, nargs="+", default=list(_SIZES), metavar="G")
    add("--counts", metavar="FILE", help="PRIVATE: a whole number for each user, one a line")
    add("--quantile_epsilon", type=float, metavar="E",
        help="spend so much ε on a private median, all that is used of --counts")  # fmt: skip
    add("--largest", type=int, default=1000, help="largest possible median, public (default 1000)")
    return parser


def _known(options: argparse.Namespace) -> tuple[float, Callable[[int], float] | None, str]:
    """The median, the number of examples by group size if counted, and what the table is called."""
    if (options.counts is None) == (options.examples_per_user is None):
        raise ConfigurationError(
            must="the number of examples of a typical user comes from one place",
            found="neither --examples_per_user nor --counts"
            if options.counts is None
            else "--examples_per_user and --counts",
            cost="a rule for group sizes without the median that it needs",
            remedy="pass --examples_per_user from public knowledge, or --counts FILE",
        )
    if options.counts is None:
        return options.examples_per_user, None, "Noise per coordinate, predicted from public facts"
    counts = _counts(options.counts)
    if options.quantile_epsilon is not None:
        median = private_quantile(counts, epsilon=options.quantile_epsilon, largest=options.largest)
        return float(median), None, f"Noise per coordinate, with a private median of {median}"
    title = "Computed from private counts: not covered by ε, do not publish or decide by it"
    return (
        float(np.median(counts)),
        lambda group_size: float(np.minimum(counts, group_size).sum()),
        title,
    )


def _counts(path: str) -> np.ndarray:
    try:
        counts = np.array(Path(path).read_text().split(), dtype=np.int64)
    except (OSError, ValueError) as failure:
        raise _no_counts(path, str(failure)) from None
    if not len(counts) or counts.min() < 1:
        raise _no_counts(path, "no counts, or one below 1")
    return counts


def _no_counts(path: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        must="--counts names a file with a whole number >= 1 for each user, one a line",
        found=f"{path}: {found}",
        cost="a comparison for other users",
        remedy="write the number of examples of each user into it",
    )


def _print(rows: Sequence[GroupSizeRow], title: str) -> None:
    from lightning_privacy.cli.tables import print_table

    print_table(
        title,
        (
            "G",
            "examples: rate",
            "noise mult.",
            "noise / C",
            "users: a step",
            "noise mult.",
            "noise / C",
        ),
        [
            (
                str(row.group_size),
                _shown(row.example_rate, ".3g"),
                _shown(row.example_noise, ".3f"),
                _shown(row.by_examples, ".2e"),
                _shown(row.users_per_step, ".4g"),
                _shown(row.user_noise, ".3f"),
                _shown(row.by_users, ".2e"),
            )
            for row in rows
        ],
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_rules(rows: Sequence[GroupSizeRow], median: float) -> None:
    examples, users = recommended(rows, median)
    if examples is not None:
        print(
            f"Examples: group_size {examples.group_size}, nearest to the median of {median:g}; "
            f"noise {_shown(examples.by_examples, '.2e')} C."
        )
    if users is not None:
        print(
            f"Users:    group_size {users.group_size}, the least predicted noise; "
            f"noise {_shown(users.by_users, '.2e')} C."
        )
    print("C is the clip norm of one example. Less noise is not all: see the page on group sizes.")


def _print_cost(options: argparse.Namespace) -> None:
    if options.counts is None:
        return
    if options.quantile_epsilon is None:
        print(
            "PRIVATE: median and rates above come from private counts, and no ε covers them. Take "
            "group_size from public knowledge, or add --quantile_epsilon 0.1."
        )
        return
    total = shown_epsilon(options.epsilon + options.quantile_epsilon)
    print(
        f"The median is private for ε = {options.quantile_epsilon:g}, each time this is run: with "
        f"the training the whole costs ε = {total}, δ = {options.delta:g}."
    )
