"""The command ``report``: the page of a finished run, made again from its data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_DESCRIPTION = """\
Make the privacy report of a finished run again from its privacy_report.json.
"""


def run_report(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The options behind ``report``.

    Raises:
        ConfigurationError: The folder holds no record, or several.
    """
    options = parsed(words)
    from lightning_privacy.reports import rebuild_page

    print(rebuild_page(options.folder, covered_only=options.covered_only, output=options.output))


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Args:
        words: The options behind ``report``.

    Returns:
        Their values.
    """
    parser = argparse.ArgumentParser(prog="lightning-privacy report", description=_DESCRIPTION)
    option = parser.add_argument
    option("folder", type=Path, metavar="RUN_DIR", help="the run's folder, or one above it")
    option(
        "--covered_only",
        action="store_true",
        help="leave out every figure that is not covered by ε, for a page that may be published",
    )
    option("--output", type=Path, help="where to write the page (default: beside the data)")
    return parser.parse_args(words)
