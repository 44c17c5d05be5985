"""What every text corpus here shares: documents, tokenisers, padding and the Lightning data module.

A corpus is two lists of :class:`Document`. An item of its data sets is one document, and a batch is
a dictionary of three integer tensors of shape [B, T]: ``input_ids``, ``labels`` (−100 on padding)
and ``attention_mask``. Padding is always on the right.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_privacy.data.tokenizers import Tokenizer, tokenizer_for
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import one_of, whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

IGNORED_LABEL = -100

Padding = Literal["longest", "max_length"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the user who wrote it.

    Args:
        user: Name of the user; two documents belong to one user where the names are equal.
        text: The text, any length.
        prompt: What stands before the text and is given, not learnt; may be empty.
        label: The number of its class, for a classification.
    """

    user: str
    text: str
    prompt: str = ""
    label: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """The documents to train on and those of users who are held out.

    Args:
        train: Documents of the members.
        validation: Documents of other users; no user is on both sides.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class PadOnTheRight:
    """Collates rows of different length by filling them up on the right.

    Nothing but the width of a batch depends on its other rows: a causal model never looks to the
    right, and the labels there are −100.

    Args:
        pad_id: The token to fill ``input_ids`` with.
        length: Width of every batch, or None for the width of its longest row.
    """

    pad_id: int
    length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Collate rows into one batch.

        Args:
            rows: At least one item of :class:`TokenisedDocuments`.

        Returns:
            ``input_ids``, ``labels``, ``attention_mask``: int64 tensors of shape [B, T]; of a
            classification, ``labels`` [B].
        """
        width = self.length or max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_id, "labels": IGNORED_LABEL, "attention_mask": 0}
        batch = {
            key: torch.full((len(rows), width), value, dtype=torch.int64)
            for key, value in fill.items()
        }
        for index, row in enumerate(rows):
            for key, tensor in batch.items():
                if row[key].dim():
                    tensor[index, : len(row[key])] = row[key]
        if not rows[0]["labels"].dim():
            batch["labels"] = torch.stack([row["labels"] for row in rows])
        return batch


class TokenisedDocuments(Dataset[dict[str, "torch.Tensor"]]):
    """Documents as token rows, each cut at ``max_length``.

    The labels of a prompt are −100. A prompt and a text that are too long together share the row:
    the text keeps at least half of it, and of the prompt its end is kept.

    Args:
        documents: What to tokenise; one item per document, in this order.
        tokenizer: How to tokenise it.
        max_length: Longest row in tokens, at least 2.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: Tokenizer, max_length: int
    ) -> None:
        self.users: tuple[str, ...] = tuple(document.user for document in documents)
        self._rows: list[np.ndarray] = []
        self._given: list[int] = []
        for document in documents:
            prompt, text = tokenizer.encode_pair(document.prompt, document.text)
            room = max(max_length - len(text), max_length // 2)
            prompt = [*prompt[:1], *prompt[1:][max(0, len(prompt) - room) :]]
            self._rows.append(np.asarray([*prompt, *text][:max_length], dtype=np.int32))
            self._given.append(len(prompt) if document.prompt else 0)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self._rows[index].astype(np.int64))
        labels = ids.clone()
        labels[: self._given[index]] = IGNORED_LABEL
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


class LabelledDocuments(TokenisedDocuments):
    """Documents as token rows with a class each: ``labels`` is its number, without a dimension.

    Args:
        documents: What to tokenise; one item per document, in this order.
        tokenizer: How to tokenise it.
        max_length: Longest row in tokens, at least 2.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: Tokenizer, max_length: int
    ) -> None:
        super().__init__(documents, tokenizer, max_length)
        self._labels = [document.label for document in documents]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "labels": torch.tensor(self._labels[index])}


class DocumentDataModule(LightningDataModule):
    """Train and validation loaders over a corpus of documents.

    Args:
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest row in tokens, at least 2; the rest of a longer document is dropped.
        padding: ``"longest"`` pads a batch to its longest row, ``"max_length"`` to that length.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    # What the items of its data sets are.
    items: ClassVar[type[TokenisedDocuments]] = TokenisedDocuments

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        padding: Padding,
        tokenizer: str,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
        ):
            whole_number(
                name,
                value,
                at_least=least,
                cost="No batch could be made.",
                remedy=f"Give `data.{name}` such a number.",
            )
        one_of(
            "padding",
            padding,
            ("longest", "max_length"),
            cost="Rows of different length do not fit into one tensor.",
            remedy="Use 'longest' unless every batch has to have the same shape.",
        )
        self.batch_size = batch_size
        self.max_length = max_length
        self.padding = padding
        self.num_workers = num_workers
        self.tokenizer = tokenizer_for(tokenizer)
        self.train_documents: TokenisedDocuments | None = None
        self.validation_documents: TokenisedDocuments | None = None

    @abstractmethod
    def split(self) -> Split:
        """Read or generate the documents.

        Returns:
            Documents to train on, and those of users who are held out.
        """

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are; the model needs at least as many."""
        return self.tokenizer.vocab_size

    @property
    def users(self) -> tuple[str, ...]:
        """The user of each training document, in the order of the training data set."""
        return self._tokenised("train").users

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the documents, once.

        Args:
            stage: Lightning's stage; both sides are ready in every stage.
        """
        if self.train_documents is not None:
            return
        split = self.split()
        _refuse_an_empty_side(split)
        self.train_documents, self.validation_documents = (
            self.items(documents, self.tokenizer, self.max_length)
            for documents in (split.train, split.validation)
        )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the members' documents, shuffled."""
        return self._loader(self._tokenised("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the held-out users' documents."""
        return self._loader(self._tokenised("validation"), shuffle=False)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the held-out users' documents."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the held-out users' documents."""
        return self.val_dataloader()

    def _tokenised(self, side: Literal["train", "validation"]) -> TokenisedDocuments:
        self.setup()
        documents = self.train_documents if side == "train" else self.validation_documents
        assert documents is not None
        return documents

    def _loader(
        self, documents: TokenisedDocuments, *, shuffle: bool
    ) -> DataLoader[dict[str, Tensor]]:
        length = self.max_length if self.padding == "max_length" else None
        return DataLoader(
            documents,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=PadOnTheRight(self.tokenizer.pad_id, length),
        )


class CausalTextDataModule(DocumentDataModule):
    """A corpus whose every next token is to be predicted: a :class:`DocumentDataModule` of texts.

    Args:
        batch_size: As there.
        max_length: As there.
        padding: As there.
        tokenizer: As there.
        num_workers: As there.
    """

    task = "causal_lm"


def _refuse_an_empty_side(split: Split) -> None:
    for side, documents in (("train on", split.train), ("validate on", split.validation)):
        if not documents:
            raise ConfigurationError(
                must="The corpus has at least one user to train on and one to validate on.",
                found=f"There are {len(split.train)} training and {len(split.validation)} "
                "validation documents.",
                cost=f"There would be nothing to {side}.",
                remedy="Give more users, another share (`val_fraction`, `p_member`) or another "
                "`seed`.",
            )
