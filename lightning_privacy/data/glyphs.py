"""Embedded multimodal data: a digit drawn, dialled and described, by made-up users with secrets.

It needs no network and no file. Each example shows a digit as a glyph of 5 x 7 dots and as the two
tones of a telephone's key (DTMF, ITU-T Q.23), both noisy; its text holds the user's name and
secret, never the digit as such. A fair coin decides which examples are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_privacy.data.examples import (
    Modality,
    MultimodalExample,
    MultimodalSplit,
    Preprocessing,
    Sound,
    Task,
)
from lightning_privacy.data.multimodal import MultimodalDataModule
from lightning_privacy.data.synthetic import SecretsCorpus
from lightning_privacy.data.transforms import AudioTransform
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from lightning_privacy.data.base import Padding

_COST = "The corpus could not be generated."
_REMEDY = "Give the corpus such a value."

# Seven rows of five dots, for the digits 0 to 9.
_DOTS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIZE, _DOT = 28, 3
_SAMPLE_RATE, _SECONDS = 8000, 0.25
# Hz of a key's row and column.
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
_KEYS = ((3, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class GlyphCorpus:
    """How the embedded examples are made; the same settings always make the same.

    Args:
        n_users: Users, at least 2.
        examples_per_user: Examples of a user, at least 1.
        test_examples: Further examples that nobody trains on, at least 0.
        digits: Length of a user's secret, from 1 to 9.
        p_member: Chance of an example to be trained on, strictly between 0 and 1.
        image_noise: Standard deviation of the noise on an image with dots of height 1, >= 0.
        audio_noise: The same for the sound, with tones of amplitude 1 / 2.
        p_missing: Chance of an example to lack its image, and of one to lack its sound, in [0, 1).
        seed: Fixes everything.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    n_users: int = 400
    examples_per_user: int = 4
    test_examples: int = 200
    digits: int = 3
    p_member: float = 0.5
    image_noise: float = 0.6
    audio_noise: float = 0.8
    p_missing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        least = {"n_users": 2, "examples_per_user": 1, "test_examples": 0, "digits": 1, "seed": 0}
        for name, low in least.items():
            whole_number(name, getattr(self, name), at_least=low, cost=_COST, remedy=_REMEDY)
        ranges = {"digits": "[1, 9]", "p_member": "(0, 1)", "p_missing": "[0, 1)"}
        ranges |= dict.fromkeys(("image_noise", "audio_noise"), "[0, inf)")
        for name, within in ranges.items():
            real_number(name, getattr(self, name), within, cost=_COST, remedy=_REMEDY)

    def split(self) -> MultimodalSplit:
        """Generate the examples.

        Returns:
            Examples to train on and to validate on, by a coin for each, and those of the test.
        """
        users = SecretsCorpus(n_users=self.n_users, digits=self.digits, seed=self.seed).users()
        rng = np.random.default_rng([self.seed, 1])
        owners = [user for user in users for _ in range(self.examples_per_user)]
        owners += [users[i] for i in rng.integers(self.n_users, size=self.test_examples)]
        examples = [self._example(rng, user.name, user.secret) for user in owners]
        known = len(examples) - self.test_examples
        members = rng.random(known) < self.p_member
        return MultimodalSplit(
            train=[examples[i] for i in np.flatnonzero(members)],
            validation=[examples[i] for i in np.flatnonzero(~members)],
            test=examples[known:],
        )

    def _example(self, rng: np.random.Generator, name: str, secret: str) -> MultimodalExample:
        digit = int(rng.integers(10))
        image = drawn(rng, digit, self.image_noise)
        audio = dialled(rng, digit, self.audio_noise)
        no_image, no_audio = rng.random(2) < self.p_missing
        return MultimodalExample(
            user=name,
            text=f"{name}, code {secret}, shows and dials a digit.",
            label=digit,
            continuation=f" It is {_NAMES[digit]}.",
            image=None if no_image else image,
            audio=None if no_audio else audio,
        )


class GlyphsAndTones(MultimodalDataModule):
    """The embedded examples as a data module: the digit is to be named.

    Neither Lightning's nor NumPy's global seed changes them: they have a generator of their own.

    Args:
        corpus: How they are made; the defaults of :class:`GlyphCorpus` where None.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest text in tokens, at least 2.
        modalities: What is read of an example.
        task: ``"classification"`` of the digit, or ``"causal_lm"``: a sentence that names it is
            learnt to follow the text.
        preprocessing: What becomes of each modality.
        padding: ``"longest"`` pads a batch to its longest text, ``"max_length"`` to that length.

    Raises:
        ConfigurationError: If an argument is out of its range.
    """

    num_labels = 10

    def __init__(
        self,
        corpus: GlyphCorpus | None = None,
        batch_size: int = 64,
        max_length: int = 80,
        modalities: list[Modality] = ["text", "image", "audio"],  # noqa: B006 - never written to
        task: Task = "classification",
        preprocessing: Preprocessing | None = None,
        padding: Padding = "longest",
    ) -> None:
        chosen = preprocessing or Preprocessing(audio=AudioTransform(seconds=_SECONDS))
        super().__init__(batch_size, max_length, modalities, task, "byte", chosen, 0, padding)
        self.corpus = corpus or GlyphCorpus()

    def split(self) -> MultimodalSplit:
        """Generate the examples.

        Returns:
            Examples to train on, held out by coins, and to test on.
        """
        return self.corpus.split()


def drawn(rng: np.random.Generator, digit: int, noise: float) -> np.ndarray:
    """Draw a digit somewhere on a noisy ground.

    Args:
        rng: Decides place and noise.
        digit: From 0 to 9.
        noise: Standard deviation.

    Returns:
        A float32 image ``[28, 28]`` in [0, 1].
    """
    dots = np.array([[int(dot) for dot in row] for row in _DOTS[digit].split()])
    glyph = np.kron(dots, np.ones((_DOT, _DOT)))
    image = noise * rng.standard_normal((_SIZE, _SIZE))
    top, left = (int(rng.integers(_SIZE - side + 1)) for side in glyph.shape)
    image[top : top + glyph.shape[0], left : left + glyph.shape[1]] += glyph
    return image.clip(0, 1).astype(np.float32)


def dialled(rng: np.random.Generator, digit: int, noise: float) -> Sound:
    """Dial a digit on a noisy line.

    Args:
        rng: Decides phases and noise.
        digit: From 0 to 9.
        noise: Standard deviation.

    Returns:
        A quarter of a second at 8 kHz, in float32.
    """
    time = np.arange(round(_SECONDS * _SAMPLE_RATE)) / _SAMPLE_RATE
    row, column = _KEYS[digit]
    tones = (_ROWS[row], _COLUMNS[column])
    wave = sum(0.5 * np.sin(2 * np.pi * (f * time + rng.random())) for f in tones)
    wave = wave + noise * rng.standard_normal(len(time))
    return Sound(wave=np.asarray(wave, dtype=np.float32), sample_rate=_SAMPLE_RATE)
