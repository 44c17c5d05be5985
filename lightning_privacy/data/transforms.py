"""Preprocessing of three modalities: normalise, take features, augment (the paper's Table 1).

Every transform acts on one example alone. Whatever it scales by is a public constant of its
configuration: a mean that was computed on private data would be an output that no ε covers (pay for
it with :func:`lightning_privacy.statistics.private_mean_and_std`).

Augmentation draws with torch's, Python's and NumPy's global generators, anew for every example.
"""

from __future__ import annotations

import unicodedata
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lightning_privacy.types import one_of, real_number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

Normalisation = Literal["z_score", "min_max", "none"]
AudioFeatures = Literal["mfcc", "spectrogram"]

_COST = "Images or sounds that the model was not made for."
_REMEDY = "Give such a value."
# Of a mel spectrogram in decibels below the loudest that 16 bits allow; silence lies at the floor.
_FLOOR_DB, _MIDDLE_DB, _SPREAD_DB = -80.0, -40.0, 20.0
# The first cepstral coefficient of such a spectrogram spreads over about so many decibels, the
# others over less and less.
_CEPSTRAL_SPREAD_DB = 60.0


def normalised_text(text: str) -> str:
    """Write a text in one form: Unicode's NFKC, and single blanks in the place of white space.

    Args:
        text: Any text.

    Returns:
        The same text; texts that look the same are the same.
    """
    return " ".join(unicodedata.normalize("NFKC", text).split())


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """How an image becomes numbers, and how it is varied while training.

    Args:
        size: Height and width in pixels.
        mode: ``"grey"`` with one channel, or ``"rgb"`` with three.
        normalisation: ``"z_score"`` subtracts ``mean`` and divides by ``std``; ``"min_max"`` maps
            each image's own darkest and brightest value to 0 and 1; ``"none"`` keeps [0, 1].
        mean: Public constant, of values in [0, 1].
        std: Public constant, > 0.
        rotation: Largest angle in degrees; 0 for none.
        horizontal_flip: Chance to be mirrored, in [0, 1].
        vertical_flip: Chance to be turned upside down, in [0, 1].
        colour: Largest relative change of brightness and contrast, and with three channels of
            saturation, in [0, 1).
        shift: Largest shift to each side, as a share of the size, in [0, 1).

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    size: int = 28
    mode: Literal["grey", "rgb"] = "grey"
    normalisation: Normalisation = "z_score"
    mean: float = 0.5
    std: float = 0.5
    rotation: float = 0.0
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    colour: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        whole_number("size", self.size, at_least=1, cost=_COST, remedy=_REMEDY)
        one_of("mode", self.mode, ("grey", "rgb"), cost=_COST, remedy=_REMEDY)
        kinds = ("z_score", "min_max", "none")
        one_of("normalisation", self.normalisation, kinds, cost=_COST, remedy=_REMEDY)
        ranges = {"mean": "(-inf, inf)", "std": "(0, inf)", "rotation": "[0, 180]"}
        ranges |= dict.fromkeys(("horizontal_flip", "vertical_flip"), "[0, 1]")
        ranges |= dict.fromkeys(("colour", "shift"), "[0, 1)")
        for name, within in ranges.items():
            real_number(name, getattr(self, name), within, cost=_COST, remedy=_REMEDY)

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.mode == "grey" else 3

    @property
    def augments(self) -> bool:
        """Whether an image is varied at all."""
        names = ("rotation", "horizontal_flip", "vertical_flip", "colour", "shift")
        return any(getattr(self, name) for name in names)

    def prepare(self, image: np.ndarray) -> Tensor:
        """Turn an image into channels of numbers in [0, 1].

        Args:
            image: ``[height, width]`` or ``[height, width, 3]``, bytes or floats in [0, 1].

        Returns:
            A float32 tensor ``[channels, size, size]``.
        """
        values = np.asarray(image, dtype=np.float32)
        if np.issubdtype(np.asarray(image).dtype, np.integer):
            values = values / 255.0
        if values.ndim == 2:
            values = values[..., None]
        if values.shape[-1] != self.channels:
            mixed = values.mean(axis=-1, keepdims=True)
            values = np.repeat(mixed, self.channels, axis=-1)
        tensor = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
        if tensor.shape[1:] == (self.size, self.size):
            return tensor
        resized = torch.nn.functional.interpolate(
            tensor[None], (self.size, self.size), mode="bilinear", antialias=True
        )
        return resized[0]

    def augment(self, image: Tensor) -> Tensor:
        """Vary an image at random.

        Args:
            image: What `prepare` returned.

        Returns:
            Another image of the same shape, in [0, 1].
        """
        varied: Tensor = self._pipeline(image[None])[0] if self.augments else image
        return varied

    def normalise(self, image: Tensor) -> Tensor:
        """Scale an image to the numbers that the encoder reads.

        Args:
            image: What `prepare` or `augment` returned.

        Returns:
            The scaled image.
        """
        if self.normalisation == "z_score":
            return (image - self.mean) / self.std
        if self.normalisation == "min_max":
            low, high = image.amin(), image.amax()
            return (image - low) / (high - low).clamp(min=1e-6)
        return image

    @cached_property
    def _pipeline(self) -> Any:
        import kornia.augmentation as kornia

        steps = []
        if self.rotation or self.shift:
            shift = (self.shift, self.shift) if self.shift else None
            steps.append(kornia.RandomAffine(self.rotation, translate=shift, p=1.0))
        if self.horizontal_flip:
            steps.append(kornia.RandomHorizontalFlip(p=self.horizontal_flip))
        if self.vertical_flip:
            steps.append(kornia.RandomVerticalFlip(p=self.vertical_flip))
        if self.colour:
            saturation = self.colour if self.channels == 3 else 0.0
            steps.append(kornia.ColorJiggle(self.colour, self.colour, saturation, 0.0, p=1.0))
        return torch.nn.Sequential(*steps)


@dataclass(frozen=True, kw_only=True)
class AudioTransform:
    """How a sound becomes frames of features, and how it is varied while training.

    Args:
        sample_rate: In Hz; a sound of another rate is resampled.
        seconds: Length; a longer sound is cut, a shorter one filled with silence.
        features: ``"spectrogram"`` (mel, in decibels) or ``"mfcc"`` of it.
        bands: Mel bands; at least 1.
        coefficients: Cepstral coefficients kept of ``"mfcc"``, at most ``bands``.
        frame: Samples of a Fourier transform.
        hop: Samples from frame to frame.
        loudness: ``"peak"`` scales each sound to its own loudest sample, ``"none"`` keeps it.
        noise: Largest amplitude of added Gaussian noise, in [0, 1]; 0 for none.
        stretch: Largest relative change of the tempo, in [0, 1).
        pitch: Largest change of the pitch in semitones, >= 0.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    sample_rate: int = 8000
    seconds: float = 1.0
    features: AudioFeatures = "spectrogram"
    bands: int = 32
    coefficients: int = 20
    frame: int = 256
    hop: int = 160
    loudness: Literal["peak", "none"] = "peak"
    noise: float = 0.0
    stretch: float = 0.0
    pitch: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("sample_rate", "bands", "coefficients", "frame", "hop"):
            whole_number(name, getattr(self, name), at_least=1, cost=_COST, remedy=_REMEDY)
        one_of("features", self.features, ("mfcc", "spectrogram"), cost=_COST, remedy=_REMEDY)
        one_of("loudness", self.loudness, ("peak", "none"), cost=_COST, remedy=_REMEDY)
        real_number("coefficients", self.coefficients, f"[1, {self.bands}]", cost=_COST,
                    remedy=_REMEDY)  # fmt: skip
        ranges = {"seconds": "(0, inf)", "noise": "[0, 1]", "stretch": "[0, 1)", "pitch": "[0, 24]"}
        for name, within in ranges.items():
            real_number(name, getattr(self, name), within, cost=_COST, remedy=_REMEDY)

    @property
    def augments(self) -> bool:
        """Whether a sound is varied at all."""
        return bool(self.noise or self.stretch or self.pitch)

    @property
    def samples(self) -> int:
        """Samples of a sound."""
        return round(self.seconds * self.sample_rate)

    def prepare(self, wave: np.ndarray, sample_rate: int) -> np.ndarray:
        """Bring a sound to the rate, length and loudness of all others.

        Args:
            wave: ``[samples]`` or ``[samples, channels]``, 16-bit whole numbers or floats.
            sample_rate: Of the sound, in Hz.

        Returns:
            A float32 array ``[samples]``, in [−1, 1] where the sound was.
        """
        values = np.asarray(wave)
        full = float(np.iinfo(values.dtype).max) if values.dtype.kind == "i" else 1.0
        values = (values.mean(axis=1) if values.ndim == 2 else values).astype(np.float32) / full
        if sample_rate != self.sample_rate:
            import librosa

            values = librosa.resample(values, orig_sr=sample_rate, target_sr=self.sample_rate)
        values = _fitted(values, self.samples)
        if self.loudness == "peak":
            values = values / max(float(np.abs(values).max()), 1e-4)
        return values

    def augment(self, wave: np.ndarray) -> np.ndarray:
        """Vary a sound at random.

        Args:
            wave: What `prepare` returned.

        Returns:
            Another sound of the same length.
        """
        if not self.augments:
            return wave
        varied = self._pipeline(samples=wave, sample_rate=self.sample_rate)
        return _fitted(np.asarray(varied, dtype=np.float32), self.samples)

    def frames(self, wave: np.ndarray) -> Tensor:
        """Compute the features that the encoder reads.

        Args:
            wave: What `prepare` or `augment` returned.

        Returns:
            A float32 tensor ``[bands or coefficients, time]``, of about unit size.
        """
        import librosa

        power = librosa.feature.melspectrogram(
            y=wave, sr=self.sample_rate, n_fft=self.frame, hop_length=self.hop, n_mels=self.bands
        )
        loud = self.frame**2 / 16
        decibels = 10 * np.log10(np.maximum(power / loud, 10 ** (_FLOOR_DB / 10)))
        if self.features == "mfcc":
            cepstrum = librosa.feature.mfcc(S=decibels - _MIDDLE_DB, n_mfcc=self.coefficients)
            spread = _CEPSTRAL_SPREAD_DB / np.sqrt(1.0 + np.arange(self.coefficients))[:, None]
            return torch.from_numpy((cepstrum / spread).astype(np.float32))
        return torch.from_numpy(((decibels - _MIDDLE_DB) / _SPREAD_DB).astype(np.float32))

    @property
    def height(self) -> int:
        """Numbers of a frame."""
        return self.coefficients if self.features == "mfcc" else self.bands

    @property
    def width(self) -> int:
        """Number of frames."""
        return 1 + self.samples // self.hop

    @cached_property
    def _pipeline(self) -> Any:
        with warnings.catch_warnings():
            # Its sources hold escape sequences that newer versions of Python complain about.
            warnings.simplefilter("ignore")
            import audiomentations

        steps = []
        if self.noise:
            low = min(1e-3, self.noise / 2)
            steps.append(audiomentations.AddGaussianNoise(low, self.noise, p=1.0))
        if self.stretch:
            steps.append(audiomentations.TimeStretch(1 - self.stretch, 1 + self.stretch, p=1.0))
        if self.pitch:
            steps.append(audiomentations.PitchShift(-self.pitch, self.pitch, p=1.0))
        return audiomentations.Compose(steps)


def _fitted(wave: np.ndarray, samples: int) -> np.ndarray:
    kept = wave[:samples]
    return np.pad(kept, (0, samples - len(kept))).astype(np.float32, copy=False)
