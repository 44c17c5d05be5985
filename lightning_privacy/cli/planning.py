"""The command ``plan``: what a configuration would cost, without training."""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning_privacy.accounting.accountants import delta_warning
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.cli.tables import print_table
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.plan import PrivacyPlan, plan_table, precision_slack_for, resolve_sampling
from lightning_privacy.types import ACCOUNTANT_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Lightning's own default where a trainer is given no end.
_LIGHTNING_EPOCHS = 1000

_DESCRIPTION = """\
Print what a configuration would cost, without training: the noise multiplier for an epsilon, or
the epsilon for a noise multiplier, and how both change with the batch size.

Either give a recipe (--config FILE; options of `fit` behind it override it, for example
--privacy.epsilon 4), or give the numbers yourself.
"""


def print_plan(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The options behind ``plan``.

    Raises:
        ConfigurationError: A number is missing, out of range, or contradicts another.
    """
    if _is_for_users(words):
        from lightning_privacy.cli.user_planning import print_user_plan

        print_user_plan(words)
        return
    options, others = _parser().parse_known_args(words)
    if options.config is not None:
        plan, size, budget, fixed_noise = _plan_of_recipe(options.config, others)
    else:
        if others:
            raise ConfigurationError(
                must="without --config, `plan` takes numbers only",
                found=f"the options {' '.join(others)}",
                cost="a plan for another run than the one that was meant",
                remedy="name the recipe with --config, or see `lightning-privacy plan --help`",
            )
        plan, size = _plan_of_numbers(options)
        if warning := delta_warning(plan.delta, size):
            print(warning, file=sys.stderr)
        budget, fixed_noise = options.epsilon, options.noise_multiplier is not None
    _print(plan, budget if fixed_noise else None)
    if plan.tiers:
        return  # other batch sizes have other tiers
    batch_sizes = options.batch_sizes or _around(plan, size)
    _print_batch_sizes(plan, size, batch_sizes, None if fixed_noise else budget)


def _is_for_users(words: Sequence[str]) -> bool:
    return "--unit=user" in words or ("--unit", "user") in pairwise(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-privacy plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", metavar="FILE", help="a recipe, as for `fit`")
    add("--unit", choices=("example",), help="or `user`, which has options of its own")
    add("--dataset_size", type=int, metavar="N", help="number of units")
    add("--expected_batch_size", type=int, metavar="B", help="units drawn by a step, on average")
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="private steps, instead of --epochs")
    add("--epsilon", type=float, help="budget: the noise multiplier is calibrated for it")
    add("--noise_multiplier", type=float, help="noise, instead of --epsilon")
    add("--delta", type=float, help="well below one over the number of units")
    add("--clip_norm", type=float, default=1.0, help="largest norm of a gradient (default 1)")
    add("--precision", default="32-true", help="as of the Trainer (default 32-true)")
    add("--accountant", choices=ACCOUNTANT_NAMES, default="pld", help="default pld, the tightest")
    add("--batch_sizes", type=int, nargs="+", metavar="B", help="rows of the second table")
    return parser


def _plan_of_numbers(options: argparse.Namespace) -> tuple[PrivacyPlan, int]:
    _require(options)
    sampling = resolve_sampling(
        sample_rate=None,
        expected_batch_size=options.expected_batch_size,
        dataset_size=options.dataset_size,
        actual_size=options.dataset_size,
        loader_batch_size=1,
    )
    steps = options.steps
    if steps is None:
        steps = math.ceil(options.epochs * sampling.steps_per_epoch)
    fields: dict[str, Any] = {
        "relation": sampling.relation,
        "sample_rate": sampling.sample_rate,
        "expected_batch_size": sampling.expected_batch_size,
        "clip_norm": options.clip_norm,
        "steps": steps,
        "delta": options.delta,
        "accountant": options.accountant,
        "precision_slack": precision_slack_for(options.precision),
    }
    if options.noise_multiplier is None:
        plan = PrivacyPlan.calibrated(epsilon=options.epsilon, **fields)
    else:
        plan = PrivacyPlan(noise_multiplier=options.noise_multiplier, **fields)
    return plan, options.dataset_size


def _require(options: argparse.Namespace) -> None:
    alternatives = (
        ("dataset_size",),
        ("expected_batch_size",),
        ("delta",),
        ("epochs", "steps"),
        ("epsilon", "noise_multiplier"),
    )
    for names in alternatives:
        given = [name for name in names if getattr(options, name) is not None]
        both_allowed = names[0] == "epsilon"
        if not given or (len(given) > 1 and not both_allowed):
            wanted = " or ".join(f"--{name}" for name in names)
            raise ConfigurationError(
                must=f"without a recipe, `plan` is given {wanted}",
                found="neither" if len(names) > 1 and not given else "both" if given else "nothing",
                cost="a plan for a run that nobody described",
                remedy=f"give one of them, {wanted}"
                if given
                else f"add {wanted}, or name a recipe with --config",
            )


def _plan_of_recipe(
    files: Sequence[str], others: Sequence[str]
) -> tuple[PrivacyPlan, int, float | None, bool]:
    from lightning_privacy.callbacks._planning import make_plan, sampling_of
    from lightning_privacy.callbacks._population import Population
    from lightning_privacy.callbacks._state import RunState
    from lightning_privacy.cli.training import read_recipe

    words = [word for file in files for word in ("--config", file)]
    recipe = read_recipe([*words, *others])
    loader = recipe.train_dataloader()
    settings = recipe.privacy.settings
    # How many examples of each user take part does not depend on the seed, only which ones.
    population = Population(settings, loader.dataset, recipe.data, seed=bytes(16))
    sampling = sampling_of(settings, loader, 1, population)
    plan = make_plan(settings, RunState(), _planned_trainer(recipe.trainer), sampling)
    size = settings.dataset_size or population.size
    return plan, size, settings.epsilon, settings.noise_multiplier is not None


def _planned_trainer(settings: dict[str, Any]) -> SimpleNamespace:
    """Make what `make_plan` reads of a trainer, without the cost of one."""
    max_epochs, max_steps = settings.get("max_epochs"), settings.get("max_steps", -1)
    if max_epochs is None:
        max_epochs = _LIGHTNING_EPOCHS if max_steps == -1 else -1
    limit = settings.get("limit_train_batches")
    return SimpleNamespace(
        global_step=0,
        precision=settings.get("precision") or "32-true",
        limit_train_batches=1.0 if limit is None else limit,
        max_epochs=max_epochs,
        max_steps=max_steps,
        min_epochs=settings.get("min_epochs"),
        min_steps=settings.get("min_steps"),
        optimizers=[],
        lightning_module=SimpleNamespace(automatic_optimization=True, parameters=list),
    )


def _around(plan: PrivacyPlan, size: int) -> list[float]:
    sizes = {max(1, round(plan.expected_batch_size * factor)) for factor in _FACTORS}
    return sorted(batch for batch in sizes if batch <= size)


def _print(plan: PrivacyPlan, budget: float | None) -> None:
    rows = plan.describe()
    if budget is not None:
        rows["steps until epsilon reaches the budget"] = str(plan.max_steps(budget))
    print_table("What this configuration costs", ("", ""), list(rows.items()))


def _print_batch_sizes(
    plan: PrivacyPlan, size: int, batch_sizes: Sequence[float], budget: float | None
) -> None:
    rows = plan_table(
        dataset_size=size,
        batch_sizes=batch_sizes,
        epochs=plan.steps / max(1, round(1 / plan.sample_rate)),
        delta=plan.delta,
        epsilon=budget,
        noise_multiplier=plan.noise_multiplier if budget is None else None,
        accountant=plan.accountant,
        precision_slack=plan.precision_slack,
        group_size=plan.parts_of_unit,
    )
    titles = ("batch", "sample rate", "steps", "noise multiplier", "epsilon", "noise / batch")
    print_table(
        "The same passes over the data with other expected batch sizes",
        titles,
        [
            (
                f"{row['expected_batch_size']:g}",
                f"{row['sample_rate']:.3g}",
                f"{row['steps']}",
                f"{row['noise_multiplier']:.4f}",
                shown_epsilon(row["epsilon"]),
                f"{row['noise_to_batch']:.2e}",
            )
            for row in rows
        ],
    )
