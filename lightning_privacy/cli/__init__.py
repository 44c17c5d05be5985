"""The command ``lightning-privacy``.

This file answers ``--help`` and mistyped commands without importing torch or Lightning; the
commands themselves are in the other modules of :mod:`lightning_privacy.cli`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from lightning_privacy.errors import ConfigurationError, PrivacyError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_OWN_COMMANDS = {
    "plan": ("planning", "print_plan"),
    "ledger": ("ledger", "run_ledger"),
    "audit": ("audit", "run_audit"),
    "report": ("report", "run_report"),
    "compare": ("compare", "run_compare"),
    "ablate": ("compare", "run_ablate"),
}
# Libraries of the extras, as they are imported.
_EXTRAS = (
    dict.fromkeys(("accelerate", "bitsandbytes", "peft", "psutil", "transformers"), "llm")
    | dict.fromkeys(("audiomentations", "kornia", "librosa", "PIL", "soundfile"), "multimodal")
    | {"datasets": "data", "matplotlib": "plots"}
)

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
  audit      attack a checkpoint, and set what was found beside what its epsilon allows
  report     make the privacy report of a finished run again

first steps:
  lightning-privacy fit --config recipes/quickstart.yaml
  lightning-privacy plan --config recipes/quickstart.yaml
  lightning-privacy plan --dataset_size 10000 --expected_batch_size 256 --epochs 3 \\
      --epsilon 8 --delta 1e-5

A recipe can build modules, data, callbacks and the like. From packages of your own it does so with
a warning; `--allow_classes my_package,other.Class` names them. Nothing else is built.

`lightning-privacy COMMAND --help` lists a command's options. Every option can stand in a recipe
(`--config FILE`); options behind --config override it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words behind the program's name; those of this process by default.

    Returns:
        The exit code: 0, or 2 if something was refused before any training step, or 1 if a run had
        to stop to keep its guarantee or its budget, or an audit refuted its claim.
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
        return _run(words)
    except (PrivacyError, ValueError) as error:
        refusal = _refusal_behind(error)
        if refusal is None:
            raise
        print(f"\nlightning-privacy stopped: {type(refusal).__name__}\n{refusal}", file=sys.stderr)
        return 2 if isinstance(refusal, ConfigurationError | UnsupportedOperationError) else 1
    except Exception as error:  # noqa: BLE001 - raised again unless it is explained
        return _explained(error)


def _explained(error: Exception) -> int:
    """Say in a line what Lightning refuses, or which extra is missing; raise any other error."""
    # By name: this file imports no Lightning.
    if type(error).__name__ == "MisconfigurationException":
        print(f"\nlightning-privacy stopped: MisconfigurationException\n{error}", file=sys.stderr)
        return 2
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        if library in _EXTRAS:
            extra = _EXTRAS[library]
            print(
                f"\nlightning-privacy stopped: {library} is not installed. It comes with the extra "
                f'`{extra}`: in a clone of the repository, `pip install ".[{extra}]"`.',
                file=sys.stderr,
            )
            return 2
    raise error


def _refusal_behind(error: BaseException | None) -> PrivacyError | None:
    # jsonargparse wraps what a class raises on its arguments into errors of its own.
    while error is not None and not isinstance(error, PrivacyError):
        error = error.__cause__
    return error


def _run(words: list[str]) -> int:
    command = words[0]
    if command in _OWN_COMMANDS:
        module, function = _OWN_COMMANDS[command]
        code = getattr(import_module(f"lightning_privacy.cli.{module}"), function)(words[1:])
        return code or 0
    if command not in TRAINER_COMMANDS and not command.startswith("-"):
        raise ConfigurationError(
            must=f"the command is one of {', '.join([*TRAINER_COMMANDS, *_OWN_COMMANDS])}",
            found=repr(command),
            cost="nothing could be run",
            remedy="see `lightning-privacy --help`",
        )
    from lightning_privacy.cli.training import PrivacyCLI

    PrivacyCLI(words)
    return 0
