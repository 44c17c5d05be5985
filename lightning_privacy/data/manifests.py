"""A user's own examples: a manifest of JSON lines, a folder by class, or a saved data set.

Audio is read with soundfile, images with Pillow; nothing is downloaded, and no copy stays in a
cache folder.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_privacy.data.examples import (
    Modality,
    MultimodalExample,
    MultimodalSplit,
    Preprocessing,
    Sound,
    Task,
    unreadable,
)
from lightning_privacy.data.multimodal import MultimodalDataModule
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from lightning_privacy.data.base import Padding

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_SOUNDS = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"}
_TEXTS = {".txt"}


class MultimodalFiles(MultimodalDataModule):
    """Examples of text, image and sound from a user's own files.

    ``path`` is one of three:

    - a file ``.jsonl`` with one example per line; image and audio are paths relative to the file;
    - a folder with a folder for each class, in which files of the same name and different endings
      (``a.png``, ``a.wav``, ``a.txt``) are one example;
    - a folder that ``Dataset.save_to_disk`` of Hugging Face datasets wrote, with columns as the
      manifest's. Audio has to be a path, bytes, or an array with its rate (a struct ``array``,
      ``sampling_rate``), not the feature ``Audio`` that decodes with torchcodec.

    Args:
        path: The file or folder.
        labels: Names of the classes in their order; for a classification.
        text_column: Key of the text.
        label_column: Key of the class, for a classification, or of the continuation.
        image_column: Key of the image's path.
        audio_column: Key of the sound's path.
        user_column: Key of the user; null makes each example its own user.
        val_fraction: Chance of a user to be held out, strictly between 0 and 1.
        seed: Which ones.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest text in tokens, at least 2.
        modalities: What is read of an example.
        task: ``"classification"``, or ``"causal_lm"``: the label column is learnt to follow.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser; null for
            the model's checkpoint.
        preprocessing: What becomes of each modality.
        padding: ``"longest"`` pads a batch to its longest text, ``"max_length"`` to that length.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If an argument is out of its range; in `setup`, if the files cannot be
            read.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        path: str,
        labels: list[str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        image_column: str = "image",
        audio_column: str = "audio",
        user_column: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 128,
        modalities: list[Modality] = ["text", "image", "audio"],  # noqa: B006 - never written to
        task: Task = "classification",
        tokenizer: str | None = "byte",
        preprocessing: Preprocessing | None = None,
        padding: Padding = "longest",
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size, max_length, modalities, task, tokenizer or "byte", preprocessing,
            num_workers, padding,
        )  # fmt: skip
        self.path, self.seed = Path(path), seed
        self.labels = None if labels is None else tuple(labels)
        self._columns = {
            "text": text_column,
            "label": label_column,
            "image": image_column,
            "audio": audio_column,
        }
        self._user_column = user_column
        self.val_fraction = real_number(
            "val_fraction",
            val_fraction,
            "(0, 1)",
            cost="There would be nothing to train on, or nothing to validate on.",
            remedy="Give the share of users to hold out, for instance 0.1.",
        )
        if task == "classification" and not labels:
            raise ConfigurationError(
                must="A classification names its classes.",
                found="No `labels`.",
                cost="Classes counted on private data would be an output that no ε covers.",
                remedy="Give `data.labels`, for instance [cat, dog].",
            )

    @property
    def num_labels(self) -> int:
        """How many classes there are; the model needs at least as many."""
        return len(self.labels or ())

    def split(self) -> MultimodalSplit:
        """Read the files.

        Whether a user is held out is a fixed function of that user's own name and the seed.

        Returns:
            Examples to train on, and those of users who are held out.

        Raises:
            ConfigurationError: If the files cannot be read.
        """
        sides: dict[bool, list[MultimodalExample]] = {True: [], False: []}
        keys: set[str] = set()
        for number, row in enumerate(_rows(self.path, self._columns)):
            example = self._example(number, row)
            sides[self._held_out(example.user)].append(example)
            keys.update(row)
        self._warn_of_absent(keys)
        return MultimodalSplit(train=sides[False], validation=sides[True])

    def _held_out(self, user: str) -> bool:
        key = f"{self.seed}\n{user}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.val_fraction * 2**64

    def _example(self, number: int, row: Mapping[str, Any]) -> MultimodalExample:
        # What is not read of an example need not be there.
        read = {*self.modalities, "text", "label"}
        held = {name: row.get(key) for name, key in self._columns.items() if name in read}
        label, continuation = 0, ""
        if self.task == "causal_lm":
            continuation = str(held["label"] or "")
        else:
            label = self._number(held["label"], number)
        folder = self.path if self.path.is_dir() else self.path.parent
        return MultimodalExample(
            user=self._user(number, row),
            text=str(held["text"] or ""),
            label=label,
            continuation=continuation,
            image=_image(held.get("image"), folder),
            audio=_sound(held.get("audio"), folder),
        )

    def _user(self, number: int, row: Mapping[str, Any]) -> str:
        if self._user_column is None:
            return str(number)
        if row.get(self._user_column) in (None, ""):
            raise ConfigurationError(
                must="Every example has a user under the key `data.user_column`.",
                found=f"Example {number} of {self.path.name} has none under "
                f"{self._user_column!r}, but the keys {', '.join(row)}.",
                cost="It would be protected with nobody, or held out by itself.",
                remedy="Mend the key or the example; null makes each example its own user.",
            )
        return str(row[self._user_column])

    def _warn_of_absent(self, keys: set[str]) -> None:
        for name in self.modalities:
            if keys and self._columns[name] not in keys:
                warnings.warn(
                    f"No example of {self.path.name} has the {name} that is to be read, under the "
                    f"key {self._columns[name]!r}; there are {', '.join(sorted(keys))}. Name the "
                    f"right key by `data.{name}_column`, or leave {name} out of the modalities of "
                    "data and model.",
                    stacklevel=2,
                )

    def _number(self, label: object, number: int) -> int:
        if self.labels is not None and str(label) in self.labels:
            return self.labels.index(str(label))
        raise ConfigurationError(
            must="Every example has one of the classes of `data.labels`.",
            found=f"Example {number} of {self.path.name} has {label!r}.",
            cost="It would be trained on as something else.",
            remedy="Add the class to `data.labels`, or mend the example.",
        )


def _rows(path: Path, columns: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    if path.is_file():
        return _lines(path)
    if (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return load_from_disk(str(path))
    if path.is_dir():
        return _files(path, columns)
    raise _nothing_there(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ConfigurationError(
                must="Every line of the manifest is an object of JSON.",
                found=f"Line {number} of {path.name} is not.",
                cost="An example would be left out silently.",
                remedy="Mend the line.",
            )
        rows.append(row)
    return rows


def _files(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(path.glob("*/*")):
        row = rows.setdefault((file.parent.name, file.stem), {columns["label"]: file.parent.name})
        ending = file.suffix.lower()
        if ending in _IMAGES:
            row[columns["image"]] = str(file.absolute())
        elif ending in _SOUNDS:
            row[columns["audio"]] = str(file.absolute())
        elif ending in _TEXTS:
            row[columns["text"]] = file.read_text(encoding="utf-8")
    if not rows:
        raise _nothing_there(path)
    return list(rows.values())


def _found(what: str, path: Path) -> str:
    # Before the first step, and not when an example is drawn and ε was spent.
    if not path.is_file():
        raise unreadable(what, str(path), "there is no such file")
    return str(path)


def _image(held: Any, folder: Path) -> np.ndarray | str | None:
    if held is None or held == "":
        return None
    if isinstance(held, str):
        return _found("image", folder / held)
    return np.asarray(held)


def _sound(held: Any, folder: Path) -> Sound | str | None:
    if held is None or held == "":
        return None
    if isinstance(held, str):
        return _found("sound", folder / held)
    if isinstance(held, Mapping) and held.get("array") is not None:
        wave = np.asarray(held["array"], dtype=np.float32)
        return Sound(wave=wave, sample_rate=int(held["sampling_rate"]))
    raise ConfigurationError(
        must="A sound is a path, or an array with its rate.",
        found=type(held).__name__,
        cost="A sound that is left out silently.",
        remedy="Store the path, or a struct of `array` and `sampling_rate`.",
    )


def _nothing_there(path: Path) -> ConfigurationError:
    return ConfigurationError(
        must="`path` is a manifest, a folder by class, or a data set that was saved to disk.",
        found=f"'{path}' holds none of these"
        + ("." if path.exists() else ": there is no such file or folder."),
        cost="There is nothing to train on.",
        remedy="Give a file ending in .jsonl, or a folder with a folder for each class; relative "
        "paths start in the working directory.",
    )
