"""`MemoryCap`: train as if the GPU were smaller, and print how much was used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback
from typing_extensions import override

from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

_GIB = 2**30


class MemoryCap(Callback):
    """Limits the GPU memory of a fit, and prints its peak at the end. On the CPU it does nothing.

    With the cap a large GPU shows whether a recipe fits a smaller one: an allocation beyond it is
    an out-of-memory error.

    Args:
        gib: The most memory that torch may reserve, in GiB; the context of CUDA, some hundred MiB,
            comes on top.

    Attributes:
        peak_gib: What torch had reserved at most; None before the end of a fit on a GPU.

    Raises:
        ConfigurationError: The cap is not above 0.
    """

    def __init__(self, gib: float) -> None:
        self.gib = real_number(
            "gib", gib, "(0, inf)", cost="no room for a model", remedy="pass for instance 12"
        )
        self.peak_gib: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the cap before a model is loaded."""
        device = trainer.strategy.root_device
        if stage != "fit" or device.type != "cuda":
            return
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.gib * _GIB / whole), device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the peak."""
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        self.peak_gib = torch.cuda.max_memory_reserved(device) / _GIB
        if trainer.is_global_zero:
            from rich.console import Console

            allocated = torch.cuda.max_memory_allocated(device) / _GIB
            Console().print(
                f"Peak GPU memory: {self.peak_gib:.2f} GiB reserved, {allocated:.2f} GiB in use, "
                f"of {self.gib:g} GiB allowed."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lift the cap."""
        device = trainer.strategy.root_device
        if stage == "fit" and device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
