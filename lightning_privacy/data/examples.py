"""Examples of text, image and sound: what they hold, and how they become tensors and batches.

A batch is a dictionary: ``input_ids`` and ``attention_mask`` [B, T], padded on the right;
``image`` [B, channels, size, size] and ``audio`` [B, features, time], each with a mask [B] that is
false where an example has none; ``labels``, classes [B] or tokens [B, T].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_privacy.data.base import IGNORED_LABEL
from lightning_privacy.data.transforms import AudioTransform, ImageTransform, normalised_text
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lightning_privacy.data.tokenizers import Tokenizer

Task = Literal["classification", "causal_lm"]
Modality = Literal["text", "image", "audio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """A recording.

    Args:
        wave: ``[samples]`` or ``[samples, channels]``, 16-bit whole numbers or floats in [−1, 1].
        sample_rate: In Hz.
    """

    wave: np.ndarray
    sample_rate: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MultimodalExample:
    """One example; what it lacks is None.

    Args:
        user: Whose it is.
        text: What the model reads, any length; never its label.
        label: The number of its class, for a classification.
        continuation: What is learnt to follow the text, for a generation.
        image: ``[height, width]`` or ``[height, width, 3]``, bytes or floats in [0, 1]; or a path.
        audio: A recording, or a path.
    """

    user: str = ""
    text: str = ""
    label: int = 0
    continuation: str = ""
    image: np.ndarray | str | None = None
    audio: Sound | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MultimodalSplit:
    """Examples to train on, examples held out at random, and those of a test.

    Args:
        train: The members.
        validation: Held out by coins that know nothing of the examples: against these, membership
            can be measured.
        test: Examples of another source, such as an official split; the held-out ones if empty.
    """

    train: Sequence[MultimodalExample]
    validation: Sequence[MultimodalExample]
    test: Sequence[MultimodalExample] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What becomes of each modality (the paper's Table 1).

    Args:
        image: Of images.
        audio: Of sounds.
        normalise_text: Whether texts are written in one form: Unicode's NFKC, single blanks.
    """

    image: ImageTransform = field(default_factory=ImageTransform)
    audio: AudioTransform = field(default_factory=AudioTransform)
    normalise_text: bool = True


class MultimodalDataset(Dataset[dict[str, "torch.Tensor"]]):
    """Examples as tensors, augmented at random when asked for.

    Args:
        examples: What to read, in this order.
        tokenizer: Of the texts.
        max_length: Longest text in tokens, at least 2; the rest of a longer one is dropped.
        modalities: What to read of an example.
        task: What its labels are.
        preprocessing: What becomes of each modality.
        augment: Whether images and sounds are varied.
    """

    def __init__(
        self,
        examples: Sequence[MultimodalExample],
        tokenizer: Tokenizer,
        max_length: int,
        *,
        modalities: Sequence[Modality],
        task: Task,
        preprocessing: Preprocessing,
        augment: bool,
    ) -> None:
        self.examples = examples
        self.users = tuple(example.user for example in examples)
        self._tokenizer, self._max_length, self._task = tokenizer, max_length, task
        self._modalities, self._preprocessing = tuple(modalities), preprocessing
        self._augment = augment
        # What is the same at each visit is computed once.
        self._kept: dict[tuple[str, int], Any] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[index]
        row = self._text(example)
        if "image" in self._modalities:
            row |= self._of("image", index, example.image)
        if "audio" in self._modalities:
            row |= self._of("audio", index, example.audio)
        return row

    def _text(self, example: MultimodalExample) -> dict[str, Tensor]:
        classes = self._task == "classification"
        # What is to be named is never among what is read.
        texts = (example.text, "" if classes else example.continuation)
        if self._preprocessing.normalise_text:
            texts = (normalised_text(texts[0]), normalised_text(texts[1]))
        given, rest = self._tokenizer.encode_pair(*texts)
        if not classes:
            given = given[: max(1, self._max_length - len(rest))]
        ids = [*given, *rest][: self._max_length if "text" in self._modalities else 1]
        targets = [*[IGNORED_LABEL] * len(given), *rest][: len(ids)]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "labels": torch.tensor(example.label if classes else targets),
        }

    def _of(self, name: str, index: int, held: Any) -> dict[str, Tensor]:
        make = self._image if name == "image" else self._audio
        return {name: make(index, held), f"{name}_mask": torch.tensor(held is not None)}

    def _image(self, index: int, held: np.ndarray | str | None) -> Tensor:
        transform = self._preprocessing.image
        if held is None:
            return torch.zeros(transform.channels, transform.size, transform.size)
        if ("image", index) not in self._kept:
            self._kept["image", index] = transform.prepare(read_image(held))
        image = self._kept["image", index]
        return transform.normalise(transform.augment(image) if self._augment else image)

    def _audio(self, index: int, held: Sound | str | None) -> Tensor:
        transform = self._preprocessing.audio
        if held is None:
            return torch.zeros(transform.height, transform.width)
        varies = self._augment and transform.augments
        if ("audio", index) not in self._kept:
            sound = read_sound(held)
            wave = transform.prepare(sound.wave, sound.sample_rate)
            self._kept["audio", index] = wave if varies else transform.frames(wave)
        kept = self._kept["audio", index]
        return transform.frames(transform.augment(kept)) if varies else kept


@dataclass(frozen=True, slots=True)
class PadTexts:
    """Collates examples: texts are filled up on the right, everything else is stacked.

    Args:
        pad_id: The token to fill ``input_ids`` with.
        length: Width of every batch's texts, or None for that of its longest one.
    """

    pad_id: int
    length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Collate rows into one batch.

        Args:
            rows: At least one item of :class:`MultimodalDataset`.

        Returns:
            Tensors led by the rows.
        """
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        return {
            name: _padded([row[name] for row in rows], fill[name], self.length)
            if name in fill and rows[0][name].dim()
            else torch.stack([row[name] for row in rows])
            for name in rows[0]
        }


def read_image(held: np.ndarray | str) -> np.ndarray:
    """Read an image.

    Args:
        held: The image itself, or the path of one.

    Returns:
        ``[height, width]`` or ``[height, width, 3]``, bytes or floats in [0, 1].

    Raises:
        ConfigurationError: If the file cannot be read.
    """
    if not isinstance(held, str):
        return held
    from PIL import Image

    try:
        with Image.open(held) as image:
            return np.asarray(image.convert("L" if image.mode in {"1", "L"} else "RGB"))
    except OSError as error:
        raise unreadable("image", held, "Pillow cannot read it") from error


def read_sound(held: Sound | str) -> Sound:
    """Read a sound.

    Args:
        held: The recording itself, or the path of one, in a format of libsndfile.

    Returns:
        The recording, in float32 if it was read.

    Raises:
        ConfigurationError: If the file cannot be read.
    """
    if isinstance(held, Sound):
        return held
    import soundfile

    try:
        wave, sample_rate = soundfile.read(held, dtype="float32")
    except (OSError, RuntimeError) as error:
        raise unreadable("sound", held, "soundfile cannot read it") from error
    return Sound(wave=wave, sample_rate=sample_rate)


def unreadable(what: str, path: str, why: str) -> ConfigurationError:
    """Refuse a file.

    Args:
        what: ``"image"`` or ``"sound"``.
        path: Where it should be.
        why: What is wrong with it.

    Returns:
        The error to raise.
    """
    return ConfigurationError(
        must=f"Every {what} that an example names can be read.",
        found=f"'{path}': {why}.",
        cost="An example without it would be trained on as if it had none.",
        remedy="Mend the file, or its path relative to the manifest; or leave the key out.",
    )


def _padded(rows: Sequence[Tensor], value: int, length: int | None) -> Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    missing = max(0, (length or 0) - padded.shape[1])
    return torch.nn.functional.pad(padded, (0, missing), value=value)
