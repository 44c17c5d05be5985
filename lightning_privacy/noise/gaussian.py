"""Independent Gaussian noise from a keyed counter stream that nothing else can reach or reseed.

The key of every stream is 128 bits of blake2b over (secret, release, parameter, chunk). On the
CPU the stream is Philox-4x64-10 (Salmon et al., SC 2011, doi 10.1145/2063384.2063405), turned
into normal values with a tail beyond 8 standard deviations: by the method of Box and Muller with
64 bits for a radius, and in float64 by the ziggurat method. A float32 generator stops at 5.76, and
the missing tail would have to be accounted for.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from lightning_privacy.errors import ConfigurationError, GuaranteeError
from lightning_privacy.types import real_number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_SECRET_BYTES = 32
# A chunk has its own key, so that the values do not depend on how many threads fill them.
# Small enough for a core's own cache and for a matrix of 2**18 to be shared by two threads; smaller
# ones cost more in calls than they save.
_CHUNK = 2**17
_MOST_THREADS = 8


def fresh_secret() -> bytes:
    """Returns 32 bytes from the operating system's secure source.

    Returns:
        A secret for `GaussianNoise`, that no seed of the program can predict.
    """
    return secrets.token_bytes(_SECRET_BYTES)


def secret_from_seed(seed: int) -> bytes:
    """Returns a secret that is a function of a seed, for deterministic tests only.

    Whoever knows the seed knows the noise: a run with such a secret has no privacy, and its ε
    must be reported as infinite.

    Args:
        seed: Any whole number; every bit of it counts.

    Returns:
        32 bytes.

    Raises:
        ConfigurationError: The seed is no whole number.
    """
    seed = whole_number(
        "seed",
        seed,
        at_least=-(2**512),
        cost="a test that cannot be repeated",
        remedy="pass a whole number",
    )
    size = seed.bit_length() // 8 + 1
    data = seed.to_bytes(size, "little", signed=True)
    return hashlib.blake2b(data, digest_size=_SECRET_BYTES, person=b"lp-seed").digest()


class GaussianNoise:
    """Gaussian noise as a function of (secret, release, parameter name, coordinate).

    Guarantees: nothing outside this object influences the values, torch's and numpy's global
    generators included, and drawing leaves those untouched; the values do not depend on the
    number of threads; the noise of one parameter in one release is drawn once only, because the
    difference of two results with the same noise has none.

    On CUDA the values are sums of two float32 draws from generators with independent 64-bit
    seeds, scaled by 1/sqrt(2). A draw stops at 5.76, but given the sum x (in standard deviations)
    both stay below with probability P(|y| < 8.15 - |x|), y normal: 1 to 3e-7 at x = 3, and 0.998
    at x = 5, which has probability 6e-7 itself; so the density is right where there is mass, and
    it reaches 8.15. Other devices get the CPU's values.

    Args:
        secret: 16 to 64 secret bytes, from `fresh_secret`. It is never shown, and the object
            refuses to be pickled or copied: noise that is known protects nobody.
        threads: How many threads fill a large CPU tensor; by default one for each core that the
            process may use, up to 8.

    Raises:
        ConfigurationError: The secret is too short or too long, or ``threads`` is not >= 1.
    """

    sum_dtype = torch.float32

    def __init__(self, secret: bytes, *, threads: int | None = None) -> None:
        if not isinstance(secret, bytes) or not 16 <= len(secret) <= 64:
            raise ConfigurationError(
                must="`secret` must be 16 to 64 bytes",
                found=f"{len(secret)} bytes"
                if isinstance(secret, bytes)
                else type(secret).__name__,
                cost="noise that can be found by searching",
                remedy="pass fresh_secret(), or secret_from_seed(seed) in a test",
            )
        self._secret = secret
        self._threads = (
            _available_threads()
            if threads is None
            else whole_number(
                "threads",
                threads,
                at_least=1,
                cost="no noise at all",
                remedy="leave it out",
            )
        )
        self._pool: ThreadPoolExecutor | None = None
        self._last_release: dict[str, int] = {}

    def __reduce__(self) -> NoReturn:
        raise GuaranteeError(
            must="the secret of the noise must stay in the process that made it",
            found="an attempt to pickle or copy a GaussianNoise",
            cost="noise that a reader of the file can subtract",
            remedy="make a new GaussianNoise(fresh_secret()) where it is needed",
        )

    def sample(self, name: str, like: Tensor, release: int, std: float) -> Tensor:
        """Returns fresh noise for one parameter in one release.

        Args:
            name: The parameter's name.
            like: A tensor whose shape and device the noise gets.
            release: The number of the release, >= 0, larger than any before for this parameter.
            std: Standard deviation in every coordinate, >= 0.

        Returns:
            A contiguous float32 tensor on ``like.device``; float64 where ``like`` is float64.

        Raises:
            ConfigurationError: The release or the standard deviation is not legal.
            GuaranteeError: The noise of this parameter and release was drawn before.
        """
        std = self._admit(name, release, std)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if like.device.type == "cuda":
            return self._cuda(name, like, release, std, dtype)
        out = torch.empty(like.shape, dtype=dtype)
        self._fill(out.view(-1), name, release, std, add=False)
        return out.to(like.device)

    def add_(self, tensor: Tensor, name: str, release: int, std: float) -> Tensor:
        """Adds noise of the same distribution as `sample` to a tensor, in place.

        On the CPU it is what `sample` would return; on CUDA, where Triton is installed, one pass
        over memory draws and adds other values: Box and Muller's, up to 9.49 standard deviations,
        from Philox-4x32-10 with 64 bits of the key as key and 64 in the counter.

        Args:
            tensor: Where to add; float32 or float64.
            name: The parameter's name.
            release: The number of the release, >= 0, larger than any before for this parameter.
            std: Standard deviation in every coordinate, >= 0.

        Returns:
            ``tensor``.

        Raises:
            ConfigurationError: The tensor has another type, or an argument is not legal.
            GuaranteeError: The noise of this parameter and release was drawn before.
        """
        if tensor.dtype not in {torch.float32, torch.float64}:
            raise ConfigurationError(
                must="noise must be added in float32 or float64",
                found=f"a tensor of type {tensor.dtype}",
                cost="noise and sums rounded so coarsely that single contributions show",
                remedy="add up and add noise in float32, and cast afterwards",
            )
        data = tensor.detach()
        if data.is_cuda and data.dtype == torch.float32 and data.is_contiguous() and _has_triton():
            from lightning_privacy.noise._triton import add_noise

            std = self._admit(name, release, std)
            add_noise(data, self._key(name, release, 0), std)
            return tensor
        if data.device.type != "cpu" or not data.is_contiguous():
            data.add_(self.sample(name, data, release, std))
            return tensor
        self._fill(data.view(-1), name, release, self._admit(name, release, std), add=True)
        return tensor

    def _admit(self, name: str, release: int, std: float) -> float:
        release = whole_number(
            "release",
            release,
            at_least=0,
            cost="noise that repeats",
            remedy="pass the number of the release",
        )
        std = real_number(
            "std",
            std,
            "[0, inf)",
            cost="noise of another size than the accounted one",
            remedy="pass plan.noise_std",
        )
        if release <= self._last_release.get(name, -1):
            raise GuaranteeError(
                must=f"each release must draw the noise of {name!r} once, in rising order",
                found=f"release {release} after release {self._last_release[name]}",
                cost="two results with the same noise, whose difference has none",
                remedy="count every release, also one that failed; after a restart make a new "
                "GaussianNoise with a fresh secret",
            )
        self._last_release[name] = release
        return std

    def _key(self, name: str, release: int, part: int) -> int:
        digest = hashlib.blake2b(key=self._secret, digest_size=16, person=b"lp-noise")
        for number in (release, part):
            data = number.to_bytes(number.bit_length() // 8 + 1, "little")
            digest.update(len(data).to_bytes(4, "little") + data)
        digest.update(name.encode())
        return int.from_bytes(digest.digest(), "little")

    def _fill(self, out: Tensor, name: str, release: int, std: float, *, add: bool) -> None:
        pieces = [
            (piece, self._key(name, release, part), std, add)
            for part, piece in enumerate(out.split(_CHUNK))
        ]
        if not out.numel():
            return
        if len(pieces) == 1 or self._threads == 1:
            for piece in pieces:
                _fill_chunk(*piece)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="noise")
        for job in [self._pool.submit(_fill_chunk, *piece) for piece in pieces]:
            job.result()

    def _cuda(
        self, name: str, like: Tensor, release: int, std: float, dtype: torch.dtype
    ) -> Tensor:
        key = self._key(name, release, 0)
        total = None
        for seed in (key & (2**64 - 1), key >> 64):
            generator = torch.Generator(device=like.device)
            generator.manual_seed(seed)
            draw = torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)
            total = draw if total is None else total.add_(draw)
        assert total is not None
        return total.mul_(std / math.sqrt(2))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _available_threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def _fill_chunk(out: Tensor, key: int, std: float, add: bool) -> None:
    """Writes or adds the values of one chunk; torch and numpy work without Python's lock."""
    stream = np.random.Philox(key=key)
    if out.dtype == torch.float64:
        values = torch.from_numpy(np.random.Generator(stream).standard_normal(out.numel()))
        values.mul_(std)
    else:
        values = _box_muller(stream, out.numel(), std)
    if add:
        out.add_(values)
    else:
        out.copy_(values)


def _box_muller(stream: np.random.Philox, size: int, std: float) -> Tensor:
    """Normal values in float32 by Box and Muller (1958), from 64 bits for each radius.

    The smallest uniform number is 2**-64, so the radius reaches 9.4. It takes half the time of
    numpy's ziggurat.
    """
    half = -(-size // 2)
    bits = torch.from_numpy(stream.random_raw(half + -(-half // 2)).view(np.int64))
    uniform = (bits[:half] & (2**63 - 1)).to(torch.float32).add_(0.5).mul_(2.0**-63)
    radius = uniform.log_().mul_(-2.0).clamp_min_(0.0).sqrt_().mul_(std)
    angle = bits[half:].view(torch.int32)[:half].to(torch.float32).mul_(math.pi * 2.0**-31)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:size]
