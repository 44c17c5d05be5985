"""The command ``lightning-privacy``.

This file answers ``--help`` and mistyped commands without importing torch or Lightning; the
commands themselves are in :mod:`lightning_privacy.cli.training`,
:mod:`lightning_privacy.cli.planning`, :mod:`lightning_privacy.cli.ledger` and
:mod:`lightning_privacy.cli.compare`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lightning_privacy.errors import ConfigurationError, PrivacyError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

HELP = """\
usage: lightning-privacy COMMAND [options]

Train any LightningModule with differential privacy, and print a true epsilon.

commands:
  fit        train; ends with a table of what was spent
  validate   evaluate a checkpoint on the validation data
  test       evaluate a checkpoint on the test data
  predict    run a checkpoint on the prediction data
  plan       print what a configuration would cost, without training
  ledger     show or add to what all runs on a data set have spent together
  compare    train a multimodal recipe and its baselines, with and without privacy: one table
  ablate     train it without each of its mechanisms: one table

first steps:
  lightning-privacy fit --config recipes/quickstart.yaml
  lightning-privacy plan --config recipes/quickstart.yaml
  lightning-privacy plan --dataset_size 10000 --expected_batch_size 256 --epochs 3 \\
      --epsilon 8 --delta 1e-5

`lightning-privacy COMMAND --help` lists a command's options. Every option can stand in a recipe
(`--config FILE`); options behind --config override it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words behind the program's name; those of this process by default.

    Returns:
        The exit code: 0, or 2 if something was refused before any training step, or 1 if a run had
        to stop to keep its guarantee or its budget.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help"}:
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        from lightning_privacy import __version__

        print(f"lightning-privacy {__version__}")
        return 0
    try:
        _run(words)
    except (PrivacyError, ValueError) as error:
        refusal = _refusal_behind(error)
        if refusal is None:
            raise
        print(f"\nlightning-privacy stopped: {type(refusal).__name__}\n{refusal}", file=sys.stderr)
        return 2 if isinstance(refusal, ConfigurationError | UnsupportedOperationError) else 1
    return 0


def _refusal_behind(error: BaseException | None) -> PrivacyError | None:
    # jsonargparse wraps what a class raises on its arguments into errors of its own.
    while error is not None and not isinstance(error, PrivacyError):
        error = error.__cause__
    return error


def _run(words: list[str]) -> None:
    command = words[0]
    if command == "plan":
        from lightning_privacy.cli.planning import print_plan

        print_plan(words[1:])
        return
    if command == "ledger":
        from lightning_privacy.cli.ledger import run_ledger

        run_ledger(words[1:])
        return
    if command in {"compare", "ablate"}:
        from lightning_privacy.cli.compare import run_table

        run_table("compare" if command == "compare" else "ablate", words[1:])
        return
    if command not in TRAINER_COMMANDS and not command.startswith("-"):
        raise ConfigurationError(
            must=f"the command is one of {', '.join(TRAINER_COMMANDS)}, plan, ledger, "
            "compare and ablate",
            found=repr(command),
            cost="nothing could be run",
            remedy="see `lightning-privacy --help`",
        )
    from lightning_privacy.cli.training import PrivacyCLI

    PrivacyCLI(words)
