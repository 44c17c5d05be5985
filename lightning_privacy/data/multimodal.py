"""The Lightning data module of examples of several modalities."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, get_args

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_privacy.data.base import Padding
from lightning_privacy.data.examples import (
    Modality,
    MultimodalDataset,
    MultimodalExample,
    MultimodalSplit,
    PadTexts,
    Preprocessing,
    Task,
)
from lightning_privacy.data.tokenizers import tokenizer_for
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import one_of, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class MultimodalDataModule(LightningDataModule):
    """Loaders over examples of several modalities.

    Args:
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest text in tokens, at least 2.
        modalities: What is read of an example.
        task: What the labels are: classes, or the tokens that continue the text.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser.
        preprocessing: What becomes of each modality.
        num_workers: Processes that load batches.
        padding: ``"longest"`` pads a batch to its longest text, ``"max_length"`` to that length:
            every batch then has one shape, for which a GPU's kernels are compiled once.

    Raises:
        ConfigurationError: If an argument is out of its range.
    """

    def __init__(  # noqa: PLR0913 - what the data modules share
        self,
        batch_size: int,
        max_length: int,
        modalities: Sequence[Modality],
        task: Task,
        tokenizer: str,
        preprocessing: Preprocessing | None,
        num_workers: int,
        padding: Padding = "longest",
    ) -> None:
        super().__init__()
        cost, remedy = "No batch could be made.", "Give such a value."
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
        ):
            whole_number(name, value, at_least=least, cost=cost, remedy=remedy)
        for name in modalities:
            one_of("modalities", name, get_args(Modality), cost=cost, remedy=remedy)
        one_of("task", task, ("classification", "causal_lm"), cost=cost, remedy=remedy)
        one_of("padding", padding, get_args(Padding), cost=cost, remedy=remedy)
        self.batch_size, self.max_length, self.num_workers = batch_size, max_length, num_workers
        self.padding = padding
        self.modalities, self.task = tuple(modalities), task
        self.tokenizer = tokenizer_for(tokenizer)
        self.preprocessing = preprocessing or Preprocessing()
        self._sets: dict[str, MultimodalDataset] = {}

    @abstractmethod
    def split(self) -> MultimodalSplit:
        """Read or generate the examples.

        Returns:
            Examples to train on, held out, and to test on.
        """

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are; the model needs at least as many."""
        return self.tokenizer.vocab_size

    @property
    def users(self) -> tuple[str, ...]:
        """The user of each training example, in the order of the training data set."""
        return self.dataset("train").users

    def setup(self, stage: str | None = None) -> None:
        """Read the examples, once.

        Args:
            stage: Lightning's stage; all sides are ready in every stage.

        Raises:
            ConfigurationError: If there is nothing to train on, or nothing to validate on.
        """
        if self._sets:
            return
        split = self.split()
        if not split.train or not split.validation:
            raise ConfigurationError(
                must="There is at least one example to train on and one to validate on.",
                found=f"There are {len(split.train)} and {len(split.validation)}.",
                cost="Nothing could be learnt, or nothing measured.",
                remedy="Give more examples, or another share to hold out.",
            )
        test = split.test or split.validation
        sides = {"train": split.train, "validation": split.validation, "test": test}
        self._sets = {name: self._dataset(name, rows) for name, rows in sides.items()}

    def dataset(
        self, side: Literal["train", "validation", "test"], *, augment: bool | None = None
    ) -> MultimodalDataset:
        """Return the examples of one side as tensors.

        Args:
            side: Which one.
            augment: Whether they are varied; by default those to train on are.

        Returns:
            The data set.
        """
        self.setup()
        found = self._sets[side]
        return found if augment is None else self._dataset(side, found.examples, augment=augment)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the examples to train on, shuffled."""
        return self.loader(self.dataset("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the examples that are held out."""
        return self.loader(self.dataset("validation"))

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the examples to test on."""
        return self.loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the examples to test on."""
        return self.test_dataloader()

    def loader(
        self, dataset: MultimodalDataset, *, shuffle: bool = False
    ) -> DataLoader[dict[str, Tensor]]:
        """Load a data set in physical batches.

        Args:
            dataset: What `dataset` returned.
            shuffle: Whether in another order each time.

        Returns:
            The loader.
        """
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=PadTexts(
                self.tokenizer.pad_id, self.max_length if self.padding == "max_length" else None
            ),
        )

    def _dataset(
        self, side: str, examples: Sequence[MultimodalExample], *, augment: bool | None = None
    ) -> MultimodalDataset:
        return MultimodalDataset(
            examples,
            self.tokenizer,
            self.max_length,
            modalities=self.modalities,
            task=self.task,
            preprocessing=self.preprocessing,
            augment=side == "train" if augment is None else augment,
        )
