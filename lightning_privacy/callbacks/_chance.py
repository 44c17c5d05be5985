"""What the training step leaves to chance, from numbers that nobody can know.

Dropout and augmentation take numbers from global generators, which most people seed with a number
that they publish. They are dealt out in the order of the rows: with one unit more, all rows behind
it get others. Averaged over numbers that are secret and alike for every row, that changes nothing
beyond what clipping bounds; with known numbers it may change all other contributions.
"""

from __future__ import annotations

import random
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_privacy.callbacks._settings import PrivacySettings

# Words of a Mersenne twister, and the bytes before them in the state of torch's.
_WORDS: Final = 624
_HEAD: Final = 24


def hide_chance(run: Any, settings: PrivacySettings) -> None:
    """From now on until the run ends, seed the global generators as `secret_chance` does.

    Args:
        run: The private run.
        settings: What the user configured: in deterministic tests and in a study, which promise
            nothing, seeds stay as they are.
    """
    if settings.test_seed is None and settings.study is None:
        run.resources.enter_context(secret_chance())


@contextmanager
def secret_chance() -> Iterator[None]:
    """Seed the global generators from the operating system; give their states back afterwards.

    Yields:
        Nothing.
    """
    with isolate_rng():
        # Of a seed the generator of the CPU keeps 32 bits, which could be tried out.
        torch.manual_seed(secrets.randbits(63))  # noqa: TID251 - what has to be secret
        torch.set_rng_state(with_words(torch.get_rng_state(), secret_words()))
        random.seed(secrets.token_bytes(4 * _WORDS))  # noqa: TID251 - the same
        words = secret_words().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, _WORDS, 0, 0.0))  # noqa: NPY002 - the same
        yield


def secret_words() -> torch.Tensor:
    """Draw a state of the Mersenne twister.

    Returns:
        ``[624]`` numbers of 32 bits.
    """
    drawn = torch.frombuffer(bytearray(secrets.token_bytes(4 * _WORDS)), dtype=torch.int32)
    return drawn.long() & 0xFFFFFFFF


def with_words(state: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Exchange the words of a generator that was just seeded.

    Args:
        state: Of a generator on the CPU, in bytes.
        words: ``[624]``.

    Returns:
        The state.
    """
    filled = state.clone()
    filled[_HEAD : _HEAD + 8 * _WORDS] = words.view(torch.uint8)
    return filled
