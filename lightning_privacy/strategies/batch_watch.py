"""Is the batch that the training step gets still the one that loader and transfer hooks made?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_privacy.errors import GuaranteeError
from lightning_privacy.sampling.batch_rows import tensors_of

if TYPE_CHECKING:
    from torch import Tensor


class BatchWatch:
    """Notices writes to a batch between its transfer and the training step.

    What a hook does to a batch there is not seen by the checks, which go from the data set through
    the collate function and the transfer hooks; and of a draw's micro-batches only the first passes
    such hooks.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []

    def delivered(self, batch: Any) -> None:
        """Remember a batch as the transfer to the device has made it.

        Args:
            batch: What it returned.
        """
        self._tensors = tensors_of(batch)
        self._versions = [tensor._version for tensor in self._tensors]

    def verify(self, batch: Any) -> None:
        """Compare with what was delivered last.

        Args:
            batch: What Lightning hands to the training step.

        Raises:
            GuaranteeError: A tensor was written to or replaced.
        """
        tensors = tensors_of(batch)
        same = len(tensors) == len(self._tensors) and all(
            own is other for own, other in zip(tensors, self._tensors, strict=True)
        )
        if same and self._versions == [tensor._version for tensor in tensors]:
            return
        raise GuaranteeError(
            must="training_step gets the batch that the loader and the transfer hooks made",
            found="a batch that was changed in between, by on_train_batch_start of the module or "
            "of a callback (mixup?)",
            cost="rows that are mixed where no check looks; and of a draw's micro-batches only the "
            "first goes through that hook",
            remedy="change the batch in on_after_batch_transfer, in the collate function or in "
            "training_step, each row by itself",
        )
