"""LightningCLI with privacy that cannot be forgotten: the commands fit, validate, test, predict."""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Importing these makes their short names, and the strategy's name, known to the parser.
import lightning_privacy.data
import lightning_privacy.models
import lightning_privacy.strategies  # noqa: F401
from lightning_privacy.callbacks import DifferentialPrivacy, Study, StudyMode
from lightning_privacy.cli.allowed import AllowedClasses, without_option
from lightning_privacy.cli.comparison import (
    leakage_rows,
    train_without_privacy,
    validation_loss,
)
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.reports import not_covered, print_summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning import LightningDataModule, LightningModule, Trainer

NO_LOSS = "none logged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a plan needs of a configuration; no model and no trainer is made for it.

    Args:
        privacy: The callback.
        data: The data module, or None where the module brings its own loaders.
        trainer: Arguments of the trainer.
    """

    privacy: DifferentialPrivacy
    data: LightningDataModule | None
    trainer: dict[str, Any]

    def train_dataloader(self) -> Any:
        """Prepare the data and return the training loader.

        Returns:
            The loader.

        Raises:
            ConfigurationError: The recipe has no data module.
        """
        if self.data is None:
            raise ConfigurationError(
                must="a recipe that is planned has a data module",
                found="no group `data`",
                cost="a sample rate for a data set of unknown size",
                remedy="give `plan` the numbers instead: --dataset_size, --expected_batch_size",
            )
        self.data.prepare_data()
        self.data.setup("fit")
        return self.data.train_dataloader()


def read_recipe(words: list[str]) -> Recipe:
    """Read a configuration as `fit` would, without building model or trainer.

    Args:
        words: Options of ``fit``.

    Returns:
        The callback, the data module and the trainer's arguments.
    """
    return _RecipeReader(["fit", *words]).recipe


def read_config(words: list[str]) -> Any:
    """Parse a configuration as `fit` would, and make nothing of it.

    Args:
        words: Options of ``fit``.

    Returns:
        A namespace of jsonargparse.
    """
    return _ConfigReader(["fit", *words]).config.fit


class PrivacyCLI(LightningCLI):
    """A LightningCLI whose trainer always has the `DifferentialPrivacy` callback.

    Its options are the top-level group ``privacy``, so no list of callbacks in another file or
    option can drop it. The strategy is ``private`` by default, which refuses to train without it.
    The optimizer is the module's own.

    Args:
        words: The command and its options; ``--allow_classes`` names packages of the user's own.

    Raises:
        ConfigurationError: A recipe would build what is no part of a training.
    """

    def __init__(self, words: list[str]) -> None:
        self._initial: LightningModule | None = None
        refuse_lost_options(words)
        words, own = without_option(words)
        self._allowed = AllowedClasses(own)
        self._allowed.read(words)
        with without_noise_of_others():
            super().__init__(
                args=words,
                trainer_defaults={"strategy": "private"},
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose errors do not begin with the names of all options.

        Args:
            **kwargs: Arguments of the parser.

        Returns:
            The parser.
        """
        # The first parser is that of all commands; from its usage come the names of the others.
        if hasattr(self, "parser"):
            kwargs.setdefault("usage", "%(prog)s --config FILE [options]")
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the group ``privacy`` and the option to compare.

        Args:
            parser: The parser of one command.
        """
        parser.add_lightning_class_args(DifferentialPrivacy, "privacy")
        parser.add_argument(
            "--study",
            type=Study | None,
            default=None,
            help="Leave parts of the mechanism out, to measure what they do. NOT private: epsilon "
            "is infinite.",
        )
        parser.add_argument(
            "--compare_without_privacy",
            type=bool,
            default=False,
            help="Whether `fit` afterwards trains the same configuration without privacy, to show "
            "what privacy costs. The second model is thrown away, its loss is not covered by ε.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words given to the constructor.

        Args:
            parser: The parser of all commands.
            args: The command and its options.
        """
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        self._allowed.check(self.config[self.config.subcommand])
        _share_checkpoint(self.config[self.config.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the callback of the group ``privacy`` and no second one.

        Args:
            **kwargs: Arguments that override the configured ones.

        Returns:
            The trainer.

        Raises:
            ConfigurationError: The trainer's own callbacks hold `DifferentialPrivacy`, too.
        """
        named = self._get(self.config_init, "trainer").get("callbacks") or []
        if any(isinstance(callback, DifferentialPrivacy) for callback in named):
            raise ConfigurationError(
                must="the privacy of a run is configured in one place, the group `privacy`",
                found="a DifferentialPrivacy callback in `trainer.callbacks`, too",
                cost="two mechanisms on one gradient, and an ε that describes neither",
                remedy="move its arguments to `privacy`, and take it out of the callbacks",
            )
        study = self._get(self.config_init, "study")
        if study is not None:
            config = self.config_init[str(self.subcommand)]
            config["privacy"] = StudyMode(config["privacy"], study)
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Keep the initial weights if another model is to be trained from them."""
        if self._get(self.config_init, "compare_without_privacy"):
            self._initial = copy.deepcopy(self.model)
            self._privacy.print_table = False

    def after_fit(self) -> None:
        """Train without privacy and print the closing table with what both lost and leaked."""
        if self._initial is None:
            return
        private = validation_loss(self.trainer, self.model, self.datamodule)
        summary = replace(self._privacy.summary(), validation_loss=private)
        print("\nNow the same configuration without privacy, to show what privacy costs.")
        other = copy.deepcopy(self._initial)
        without = train_without_privacy(
            other,
            self.datamodule,
            dict(self._get(self.config_init, "trainer")),
            steps=summary.steps,
            batch_size=summary.plan.expected_batch_size,
        )
        shown = NO_LOSS if without is None else f"{without:.4f}"
        rows = [(not_covered("validation loss without privacy"), shown)]
        rows += leakage_rows(self.model, other, self._initial, self.datamodule)
        print_summary(summary, rows)

    @property
    def _privacy(self) -> DifferentialPrivacy:
        callback: Any = self._get(self.config_init, "privacy")
        assert isinstance(callback, DifferentialPrivacy)
        return callback


def refuse_lost_options(words: list[str]) -> None:
    """Refuse options that a recipe behind them would override.

    Args:
        words: The command and its options.

    Raises:
        ConfigurationError: An option stands before ``--config``.
    """
    recipes = [
        place
        for place, word in enumerate(words)
        if word in {"-c", "--config"} or word.startswith("--config=")
    ]
    last = recipes[-1] if recipes else 0
    early = [w for n, w in enumerate(words[:last]) if w.startswith("-") and n not in recipes]
    if early:
        raise ConfigurationError(
            must="options stand behind the last --config",
            found=f"{' '.join(early)} before it",
            cost="the recipe's values would be taken in their place: another ε than was asked for",
            remedy="put --config first",
        )


def _share_checkpoint(config: Any) -> None:
    """Give data without a tokeniser that of the model's checkpoint: a user names it once."""
    data, model = (config.get(f"{group}.init_args") for group in ("data", "model"))
    if data is None or model is None or "tokenizer" not in data:
        return
    if data["tokenizer"] is None:
        data["tokenizer"] = model.get("checkpoint") or model.get("pretrained.checkpoint")


@contextmanager
def without_noise_of_others() -> Iterator[None]:
    """Leave out what a user of this program can do nothing about."""

    def useful(record: logging.LogRecord) -> bool:
        return "Tip: For seamless cloud" not in record.getMessage()

    announcer = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    announcer.addFilter(useful)
    try:
        with warnings.catch_warnings():
            # What Lightning calls of newer versions of torch and jsonargparse.
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", "(?s).*(instantiate_classes|Jsonargparse)")
            warnings.filterwarnings("ignore", ".*not supported by the model summary")
            yield
    finally:
        announcer.removeFilter(useful)


class _ConfigReader(PrivacyCLI):
    """Stops after parsing."""

    def _set_seed(self) -> None:
        """Nothing is drawn here."""

    def instantiate_classes(self) -> None:
        self.subcommand = None


class _RecipeReader(_ConfigReader):
    """Stops after the data module, so that a model of any size costs nothing."""

    recipe: Recipe

    def instantiate_classes(self) -> None:
        config = self.config.clone()
        settings = config.fit.trainer.as_dict()
        config.fit.model = None
        for name in ("logger", "callbacks", "plugins", "profiler", "strategy", "accelerator"):
            config.fit.trainer[name] = None
        if config.fit.study is not None:
            raise ConfigurationError(
                must="what is planned is private",
                found="a recipe with the group `study`",
                cost="an ε that the training will not have",
                remedy="leave `study` out, with `--study null`",
            )
        made = self.parser.instantiate_classes(config).fit
        self.recipe = Recipe(privacy=made.privacy, data=made.get("data"), trainer=settings)
        self.subcommand = None
