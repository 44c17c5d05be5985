"""The commands `compare` and `ablate`: one recipe, several models and seeds, one table."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_privacy.cli.comparison import without_announcements
from lightning_privacy.cli.experiment import outcome_of, place_of
from lightning_privacy.cli.tables import print_table
from lightning_privacy.cli.training import read_config, without_noise_of_others
from lightning_privacy.cli.variants import Variant, ablated, compared
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.reports.outcomes import COLUMNS, Outcome, markdown, rows_of, write_csv
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Command = Literal["compare", "ablate"]

_TITLES = {
    "compare": "Three models (the paper's Table 2)",
    "ablate": "What each mechanism does (the paper's Table 3)",
}
_REMARKS = """\
Mean ± standard deviation over seeds, on the test. Privacy leakage is the advantage TPR − FPR of an
attack by the loss, its threshold chosen on other examples; 0 is none. Its interval is the mean of
the runs' own. All figures but ε are computed on private data and not covered by ε. Rows with ε = ∞
were trained in study mode and are not private.
"""


def run_compare(words: Sequence[str]) -> None:
    """`run_table` of three models.

    Args:
        words: Words behind ``compare``.
    """
    run_table("compare", words)


def run_ablate(words: Sequence[str]) -> None:
    """`run_table` of one model without each of its mechanisms.

    Args:
        words: Words behind ``ablate``.
    """
    run_table("ablate", words)


def run_table(command: Command, words: Sequence[str]) -> None:
    """Train every model of a table with every seed, and print and save it.

    A model whose outcome is in the output folder, under the same recipe, is not trained again.
    Processes with the same options and the same folder share the work: each trains models that no
    other has taken, waits for the rest, and prints the whole table.

    Args:
        command: Which table.
        words: The options behind the command.

    Raises:
        ConfigurationError: The recipe has no multimodal model or its own `study`, seeds or budgets
            make no table, or the output folder cannot be made.
    """
    options, recipe, variants = planned(command, words)
    folder = Path(options.output)
    with _explained_interruption(folder):
        outcomes = _trained(variants, options.seeds, _made(folder), recipe)
    places = [place_of(folder, v, seed) for v in variants for seed in options.seeds if v.private]
    _save(command, outcomes, folder, [place / "log" / "metrics.csv" for place in places])
    print_table(_TITLES[command], [name for name, _ in COLUMNS], rows_of(outcomes))
    print(_REMARKS)
    print(f"Saved in {folder}: {command}.md, {command}.csv and figures.")


def planned(
    command: Command, words: Sequence[str]
) -> tuple[argparse.Namespace, list[str], list[Variant]]:
    """Read the options.

    Args:
        command: Which table.
        words: The options behind the command.

    Returns:
        Its own options, those of `fit`, and the models to train with each seed.

    Raises:
        ConfigurationError: The recipe has no multimodal model or its own `study`, or seeds or
            budgets make no table.
    """
    options, recipe = _parser(command).parse_known_args(words)
    return options, recipe, _variants(command, options, recipe)


def _parser(command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"lightning-privacy {command}",
        description=f"{_TITLES[command]}: trains each with each seed. All other options are those "
        "of `fit`, first of all --config FILE.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    add(
        "--epsilons",
        type=float,
        nargs="+",
        metavar="E",
        help="budgets of the private model; by default the recipe's",
    )
    add(
        "--baseline_learning_rate",
        type=float,
        metavar="RATE",
        help="of the models without clipping and noise; by default the recipe's",
    )
    add(
        "--baseline_batch_size",
        type=int,
        metavar="B",
        help="of the models without clipping and noise, which need no large one",
    )
    add("--output", default=f"runs/{command}", metavar="DIR", help=f"default runs/{command}")
    return parser


def _variants(command: Command, options: argparse.Namespace, recipe: list[str]) -> list[Variant]:
    if not any(word.startswith(("--config", "-c", "--model")) for word in recipe):
        raise ConfigurationError(
            must=f"`{command}` starts from a recipe",
            found="no --config",
            cost="there is no model to train",
            remedy="add --config recipes/multimodal/quick.yaml, or a recipe of your own",
        )
    config = read_config(recipe)
    _require_valid(command, options, config)
    model = config.get("model.init_args")
    if model is None or "modalities" not in model:
        raise ConfigurationError(
            must="the recipe's model is a PrivacyPreserveNet",
            found=str(config.get("model.class_path")),
            cost="rows of a table that all show the same model",
            remedy="start from recipes/multimodal/quick.yaml",
        )
    epsilons = options.epsilons or [config.privacy.epsilon]
    if command == "ablate":
        return ablated(epsilons)
    baseline = options.baseline_learning_rate, options.baseline_batch_size
    return compared(model.modalities, epsilons, *baseline)


def _require_valid(command: Command, options: argparse.Namespace, config: Any) -> None:
    # Now, and not when the first of these models comes up, hours later.
    for epsilon in options.epsilons or ():
        real_number(
            "epsilons", epsilon, "(0, inf)", cost="models of no budget", remedy="for example 8"
        )
    if len(set(options.seeds)) < len(options.seeds):
        raise ConfigurationError(
            must="a table has each seed once",
            found=f"--seeds {' '.join(map(str, options.seeds))}",
            cost="one model would count twice, and the deviation over seeds be too small",
            remedy="give different seeds",
        )
    if config.get("study") is not None:
        raise ConfigurationError(
            must=f"`{command}` starts from a recipe without a group `study`",
            found="a recipe that leaves a mechanism out by itself",
            cost="the private model's row would show one that is not private",
            remedy=f"drop `study` and its overlay: `{command}` leaves out what it has to",
        )


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            must="`--output` is a folder, or can be made one",
            found=f"'{folder}': {error.strerror}",
            cost="no finished model could be kept",
            remedy="give another folder",
        ) from error
    return folder


@contextmanager
def _explained_interruption(folder: Path) -> Iterator[None]:
    # Lightning makes an exit of Ctrl-C while a model trains.
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(
            f"\nStopped. What is finished stays in {folder}; the same command again goes on there.",
            file=sys.stderr,
        )
        raise


def _trained(
    variants: Sequence[Variant], seeds: Sequence[int], folder: Path, recipe: list[str]
) -> list[Outcome]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    waiting = [(seed, variant) for seed in seeds for variant in variants]
    found: dict[tuple[int, int], Outcome] = {}
    with ExitStack() as stack:
        stack.enter_context(without_announcements())
        stack.enter_context(without_noise_of_others())
        columns: tuple[Any, ...] = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bars = stack.enter_context(Progress("{task.description}", *columns))
        runs = bars.add_task("models", total=len(waiting))
        # First what no other process has taken; then what others have, when they are done with it.
        for wait in (False, True):
            for seed, variant in waiting:
                steps = bars.add_task(f"{variant.name}, seed {seed}", total=None)

                def progress(done: int, planned: int, steps: Any = steps) -> None:
                    bars.update(steps, completed=done, total=planned)

                outcome = outcome_of(list(recipe), variant, seed, folder, progress, wait=wait)
                bars.remove_task(steps)
                if outcome is not None:
                    found[variants.index(variant), seed] = outcome
                    bars.advance(runs)
            waiting = [(s, v) for s, v in waiting if (variants.index(v), s) not in found]
    return [found[place, seed] for place in range(len(variants)) for seed in seeds]


def _save(command: Command, outcomes: list[Outcome], folder: Path, logs: list[Path]) -> None:
    from lightning_privacy.reports.plots import plot_components, plot_outcomes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{command}.md").write_text(markdown(outcomes) + "\n" + _REMARKS)
    write_csv(outcomes, folder / f"{command}.csv")
    plot_outcomes(outcomes, folder / f"{command}.svg")
    # Of the whole private model; logs of other tables may lie in the same folder.
    whole = [path for path in logs if path.parts[-3].startswith(("privacypreservenet", "full"))]
    if shown := [path for path in whole if path.exists()]:
        plot_components(shown, folder / "components.svg", folder / "indicators.svg")
