"""The command ``ledger``: what all runs on a data set have spent together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_privacy.accounting import GaussianRelease, PrivacyLedger
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

_DESCRIPTION = """\
Show what all runs on a data set have spent together, or charge what was released elsewhere.
"""


def run_ledger(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The options behind ``ledger``.

    Raises:
        ConfigurationError: There is no such file or data set, or a number is out of its range.
        GuaranteeError: The name of a run is taken.
    """
    options = parsed(words)
    if options.action == "show":
        _show(_opened(options.file, options.dataset, None))
        return
    budget = None if options.budget is None else (options.budget[0], options.budget[1])
    ledger = _opened(options.file, options.dataset, budget)
    release = GaussianRelease(
        noise_multiplier=options.noise_multiplier,
        sample_rate=options.sample_rate,
        count=options.steps,
    )
    ledger.add(options.run, [release], note=options.note)
    _show(ledger)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Args:
        words: The options behind ``ledger``.

    Returns:
        Their values; ``action`` is "show" or "add".
    """
    parser = argparse.ArgumentParser(prog="lightning-privacy ledger", description=_DESCRIPTION)
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="print the runs, and what is left of the budget")
    add = actions.add_parser("add", help="charge what was released elsewhere")
    for action in (show, add):
        action.add_argument("file", type=Path, help="the SQLite file")
        action.add_argument("--dataset", required=True, help="name of the data set")
    option = add.add_argument
    option("--run", required=True, help="a name for what was released")
    option("--noise_multiplier", type=float, required=True, help="noise over sensitivity")
    option("--sample_rate", type=float, default=1.0, help="chance of each unit (default 1)")
    option("--steps", type=int, default=1, help="number of releases (default 1)")
    option("--note", default="", help="what it was")
    option("--budget", type=float, nargs=2, metavar=("EPSILON", "DELTA"), help="if it is new")
    return parser.parse_args(words)


def _opened(file: Path, dataset: str, budget: tuple[float, float] | None) -> PrivacyLedger:
    if budget is None and not file.is_file():
        raise ConfigurationError(
            must="the ledger is a file that exists",
            found=f"no file {file}",
            cost="a new ledger, in which nothing is spent",
            remedy="check the path; to begin a ledger, pass --budget EPSILON DELTA to `add`",
        )
    return PrivacyLedger(file, dataset=dataset, budget=budget)


def _show(ledger: PrivacyLedger) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    limit, delta = ledger.budget
    spent = ledger.epsilon()
    title = f"{ledger.dataset}: ε = {shown_epsilon(spent)} of {limit:g} at δ = {delta:g}"
    if spent > limit:
        title += ", more than the budget: no run fits"
    table = Table(title=Text(title), title_justify="left")
    for name in ("run", "state", "draws", "noise multiplier", "sample rate", "note"):
        table.add_column(name)
    for entry in ledger.entries():
        state = "settled" if entry.settled else "reserved"
        for release in entry.releases:
            cells = (
                entry.run,
                state,
                str(release.count),
                f"{release.noise_multiplier:.4g}",
                f"{release.sample_rate:.4g}",
                entry.note,
            )
            table.add_row(*map(Text, cells))
    Console().print(table)
