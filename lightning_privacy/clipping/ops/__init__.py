"""Rules by operation, one file per family. Importing this package registers them."""

from lightning_privacy.clipping.ops import (
    attention,
    convolution,
    elementwise,
    embedding,
    linear,
    normalization,
    recurrent,
)

__all__ = [
    "attention",
    "convolution",
    "elementwise",
    "embedding",
    "linear",
    "normalization",
    "recurrent",
]
