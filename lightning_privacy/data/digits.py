"""Spoken and handwritten digits: pairs of an image and a recording of the same digit.

The file is an archive of NumPy with the arrays ``image`` [N, 28, 28] (bytes), ``digit``,
``speaker`` and ``take`` [N], ``speakers`` (names), ``wave`` [samples] (16-bit whole numbers, all
recordings one behind the other), ``offset`` [N + 1] (where each begins) and ``sample_rate``. It
can be made from the Free Spoken Digit Dataset and MNIST; its official test split are the takes 0
to 4.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_privacy.data.examples import (
    Modality,
    MultimodalExample,
    MultimodalSplit,
    Preprocessing,
    Sound,
)
from lightning_privacy.data.multimodal import MultimodalDataModule
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEST_TAKES = 5
_ARRAYS = ("image", "digit", "speaker", "take", "speakers", "wave", "offset", "sample_rate")


class SpokenDigits(MultimodalDataModule):
    """Pairs of a handwritten and a spoken digit, with the official test split.

    The text is an instruction with the speaker's name and a transcript whose digit is masked: it
    never holds the label. Of the other pairs some are held out by a fixed function of each pair's
    own name and the seed, so that membership can be measured on examples that differ in nothing
    but that coin.

    Args:
        path: The archive.
        val_fraction: Chance of a pair outside the test to be held out, strictly between 0 and 1.
        seed: Which ones.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest text in tokens, at least 2.
        modalities: What is read of an example.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser.
        preprocessing: What becomes of each modality.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If an argument is out of its range; in `setup`, if the file cannot be
            read or lacks an array.
    """

    num_labels = 10

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        path: str,
        val_fraction: float = 0.2,
        seed: int = 0,
        batch_size: int = 64,
        max_length: int = 48,
        modalities: list[Modality] = ["text", "image", "audio"],  # noqa: B006 - never written to
        tokenizer: str = "byte",
        preprocessing: Preprocessing | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size, max_length, modalities, "classification", tokenizer, preprocessing,
            num_workers,
        )  # fmt: skip
        self.path, self.seed = path, seed
        self.val_fraction = real_number(
            "val_fraction",
            val_fraction,
            "(0, 1)",
            cost="There would be nothing to train on, or nothing to validate on.",
            remedy="Give the share of pairs to hold out, for instance 0.2.",
        )

    def split(self) -> MultimodalSplit:
        """Read the archive.

        Returns:
            Pairs to train on, pairs held out at random, and those of the official test split.

        Raises:
            ConfigurationError: If the file cannot be read or lacks an array.
        """
        arrays = _read(self.path)
        sides: dict[str, list[MultimodalExample]] = {"train": [], "validation": [], "test": []}
        for row in range(len(arrays["digit"])):
            sides[self._side(arrays, row)].append(_example(arrays, row))
        return MultimodalSplit(**sides)

    def _side(self, arrays: Mapping[str, Any], row: int) -> str:
        own = [int(arrays[name][row]) for name in ("digit", "speaker", "take")]
        if own[2] < _TEST_TAKES:
            return "test"
        digest = hashlib.blake2b(repr([self.seed, *own]).encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self.val_fraction * 2**64
        return "validation" if held_out else "train"


def _example(arrays: Mapping[str, Any], row: int) -> MultimodalExample:
    name = str(arrays["speakers"][arrays["speaker"][row]])
    start, end = (int(arrays["offset"][row + step]) for step in (0, 1))
    sound = Sound(wave=arrays["wave"][start:end], sample_rate=int(arrays["sample_rate"]))
    return MultimodalExample(
        user=name,
        text=f"{name} says _",
        label=int(arrays["digit"][row]),
        image=arrays["image"][row],
        audio=sound,
    )


def _read(path: str) -> dict[str, Any]:
    try:
        with np.load(Path(path)) as archive:
            return {name: archive[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            must=f"`path` is an archive of NumPy with the arrays {', '.join(_ARRAYS)}.",
            found=f"'{path}': {error}.",
            cost="There is nothing to train on.",
            remedy="Give the path of such a file, `--data.path FILE`.",
        ) from error
