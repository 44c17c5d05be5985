"""Per-example gradients, clipped: the engine and its two public functions."""

from lightning_privacy.clipping.functional import clipped_gradient_sum, per_example_gradients

__all__ = ["clipped_gradient_sum", "per_example_gradients"]
