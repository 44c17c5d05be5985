"""Which classes a recipe may build: a configuration file must not be a way to run any program.

A recipe names classes, and a class that is built runs code. From the packages below they are built
without a word. Anything else has to be a part of a training (a module, a callback, an optimizer
and the like) and is announced before it is imported, unless the user names it on the command
line. Functions, the standard library, and classes that are no part of a training are refused.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PACKAGES = (
    "lightning_privacy",
    "lightning",
    "pytorch_lightning",
    "torch",
    "torchmetrics",
    "transformers",
    "peft",
)
"""From these every class that is a part of a training is built without a warning."""

OPTION = "--allow_classes"
_PARTS: tuple[type, ...] = (
    *(nn.Module, Optimizer, LRScheduler, Dataset, Sampler),
    *(LightningDataModule, Callback, Logger, Profiler, Strategy, Accelerator),
    *(CheckpointIO, ClusterEnvironment, LayerSync, Precision),
)
_FILES = (".yaml", ".yml", ".json")


class AllowedClasses:
    """What a user lets a recipe build.

    Args:
        own: Packages, modules or classes that the user named on the command line.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._own = tuple(own)

    def read(self, words: Sequence[str]) -> None:
        """Look at every class that the files and the options name, before anything is imported.

        Args:
            words: The command line.

        Raises:
            ConfigurationError: One belongs to the standard library.
        """
        for path in dict.fromkeys(path for value in _values(words) for path in _named(value)):
            top = path.partition(".")[0]
            if self._is_own(path) or top in PACKAGES:
                continue
            if top in sys.stdlib_module_names:
                raise _refused(path, "which belongs to Python's standard library")
            warnings.warn(
                f"The recipe builds {path}, whose code runs with all your rights. If you know it, "
                f"name it: {OPTION} {top}",
                stacklevel=2,
            )

    def check(self, config: Any) -> None:
        """Refuse what is no part of a training, before anything is built.

        Args:
            config: The parsed configuration.

        Raises:
            ConfigurationError: A class path names a function, or a class of another kind; or an
                option that takes a function got one from elsewhere.
        """
        for value in _walk(config):
            if isinstance(value, str):
                self._check_path(value)
            else:
                path = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
                if path.partition(".")[0] != "lightning_privacy" and not self._is_own(path):
                    raise _refused(path, "a function from outside of this package")

    def _check_path(self, path: str) -> None:
        if self._is_own(path):
            return
        found = _imported(path)
        if not inspect.isclass(found):
            raise _refused(path, "which is no class")
        home = str(found.__module__).partition(".")[0]
        # A name in an allowed package may be that of another one's class.
        if home != "lightning_privacy" and not issubclass(found, _PARTS):
            raise _refused(path, "which is no part of a training")

    def _is_own(self, path: str) -> bool:
        return any(path == own or path.startswith(f"{own}.") for own in self._own)


def without_option(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the user's own packages off the command line: no recipe can name them.

    Args:
        words: The command line.

    Returns:
        The other words, and the packages, which are separated by commas.
    """
    rest: list[str] = []
    own: list[str] = []
    left = iter(words)
    for word in left:
        if word == OPTION or word.startswith(f"{OPTION}="):
            given = word.partition("=")[2] or ("" if "=" in word else next(left, ""))
            own.extend(name.strip() for name in given.split(",") if name.strip())
        else:
            rest.append(word)
    return rest, own


def _values(words: Sequence[str]) -> Iterator[Any]:
    """What stands behind options, and in the files that they name."""
    for before, word in zip(("", *words), words, strict=False):
        name, given, value = word.partition("=")
        key, text = (name, value) if given and word.startswith("--") else (before, word)
        if key.endswith(".class_path"):
            yield {"class_path": text}
        if text.endswith(_FILES) and Path(text).is_file():
            text = Path(text).read_text()
        try:
            yield yaml.safe_load(text)
        except yaml.YAMLError:
            continue  # the parser will say what is wrong with it


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "class_path" and isinstance(inner, str) and "." in inner:
                yield inner
            else:
                yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _walk(config: Any) -> Iterator[Any]:
    """Class paths, and functions, anywhere in a parsed configuration."""
    if isinstance(config, list | tuple):
        for inner in config:
            yield from _walk(inner)
    elif isinstance(config, dict | Namespace):
        entries = config if isinstance(config, dict) else vars(config)
        for key, inner in entries.items():
            if key == "class_path" and isinstance(inner, str):
                yield inner
            else:
                yield from _walk(inner)
    elif inspect.isroutine(config):
        yield config


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _refused(path: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        must="a recipe builds parts of a training: modules, data, callbacks, optimizers, loggers",
        found=f"{path}, {what}",
        cost="a configuration file that runs whatever its author wanted",
        remedy=f"take it out; if it is yours and meant, pass {OPTION} {path}",
    )
