"""Canaries as rows of the training data: records of the mechanism like any other.

They are put in where a private run takes its data set, before anything is drawn, so that they are
sampled, clipped and noised like the rest. Whether a canary was put in is a secret: nothing that is
public may follow from how many were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch.utils.data import Dataset

from lightning_privacy.sampling.loader import check_loader, rebuilt
from lightning_privacy.sampling.users import UserIndex

if TYPE_CHECKING:
    from collections.abc import Sequence


class InsertsRows(Callback):
    """A callback that adds rows to the training data of a private run."""

    def included_rows(self, dataset: Any) -> tuple[Sequence[Any], int]:
        """Give the rows to add.

        Args:
            dataset: The training data.

        Returns:
            The rows, and how many of them are expected: a public number.
        """
        raise NotImplementedError


class WithCanaries(Dataset[Any]):
    """A data set with further rows behind its own.

    Args:
        base: The data set.
        rows: The further rows.
        expected: How many further rows are counted in public: it must not depend on how many there
            are.
    """

    def __init__(self, base: Any, rows: Sequence[Any], expected: int) -> None:
        self.base, self.rows, self.expected = base, tuple(rows), expected

    def __len__(self) -> int:
        return len(self.base) + len(self.rows)

    def __getitem__(self, index: int) -> Any:
        own = len(self.base)
        return self.base[index] if index < own else self.rows[index - own]

    def user_index(self, base: UserIndex) -> UserIndex:
        """Whose rows are whose: every canary is a user of its own.

        Args:
            base: The same of the data set without canaries.

        Returns:
            The index of all rows.
        """
        ids: list[Any] = [None] * base.size
        for user, key in enumerate(base.ids):
            for row in base.rows(user).tolist():
                ids[row] = key
        return UserIndex([*ids, *(("canary", number) for number in range(len(self.rows)))])


def with_canaries(dataloader: Any, trainer: Any) -> Any:
    """Check a training loader, and give it the rows that callbacks add.

    Args:
        dataloader: What the module or the data module gave to Lightning.
        trainer: The trainer of the fit.

    Returns:
        The loader itself, or one of the same settings over more rows.

    Raises:
        UnsupportedOperationError: The loader cannot be sampled by Poisson draws.
    """
    check_loader(dataloader)
    for callback in trainer.callbacks:
        if isinstance(callback, InsertsRows):
            rows, expected = callback.included_rows(dataloader.dataset)
            if expected:
                dataset = WithCanaries(dataloader.dataset, rows, expected)
                # The order does not matter: private draws replace it.
                dataloader = rebuilt(dataloader, dataset, {"batch_size": dataloader.batch_size})
    return dataloader


def without_canaries(dataset: Any) -> Any:
    """The training data without further rows.

    Args:
        dataset: A data set.

    Returns:
        The same, or what it was made from.
    """
    while isinstance(dataset, WithCanaries):
        dataset = dataset.base
    return dataset


def public_size(dataset: Any, size: int) -> int:
    """A number of units that says nothing about which canaries are among them.

    Args:
        dataset: The training data.
        size: Their true number.

    Returns:
        The same with as many canaries as are expected.
    """
    if isinstance(dataset, WithCanaries):
        return size - len(dataset.rows) + dataset.expected
    return size
