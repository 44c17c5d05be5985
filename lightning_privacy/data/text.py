"""A user's own text: JSON lines, CSV or Parquet, read through Hugging Face datasets.

The file never leaves the machine, and no copy of it stays in a cache folder.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_privacy.data.base import CausalTextDataModule, Document, Padding, Split
from lightning_privacy.data.synthetic import SecretsCorpus, split_by_membership
from lightning_privacy.data.tables import read_table, split_by_user
from lightning_privacy.types import real_number


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of texts, a row per document.

    Args:
        path: A file ending in .jsonl, .json, .csv or .parquet, optionally followed by .gz.
        text_column: Column of the text; strings.
        user_column: Column that names the user, any scalar; None makes each row its own user.
        val_fraction: Chance of a user to be held out, strictly between 0 and 1.
        seed: Which users are held out.

    Raises:
        ConfigurationError: If ``val_fraction`` is out of range.
    """

    path: str
    text_column: str = "text"
    user_column: str | None = "user"
    val_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a share out of range."""
        real_number(
            "val_fraction",
            self.val_fraction,
            "(0, 1)",
            cost="There would be nothing to train on, or nothing to validate on.",
            remedy="Give the share of users to hold out, for instance 0.1.",
        )

    def documents(self) -> tuple[Document, ...]:
        """Read every row.

        Returns:
            One document per row, in the order of the file.

        Raises:
            ConfigurationError: If the file is missing, empty or unreadable, or a column is missing
                or of another type.
        """
        table = read_table(self.path)
        texts = table.strings(self.text_column, "text_column")
        users = table.users(self.user_column, texts)
        return tuple(map(Document, users, texts))

    def split(self) -> Split:
        """Hold users out.

        Whether a user is held out is a fixed function of that user's own name and the seed, so one
        more or one fewer user changes nothing for the others.

        Returns:
            Documents of the users to train on, and of the users who are held out.

        Raises:
            ConfigurationError: As :meth:`documents`.
        """
        return split_by_user(self.documents(), self.val_fraction, self.seed)


class TextDataModule(CausalTextDataModule):
    """A user's own text as a data module.

    Args:
        path: A file ending in .jsonl, .json, .csv or .parquet, optionally followed by .gz.
        text_column: Column of the text; strings.
        user_column: Column that names the user; null makes each row its own user.
        val_fraction: Chance of a user to be held out, strictly between 0 and 1.
        seed: Which users are held out.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest row in tokens, at least 2; the rest of a longer text is dropped.
        padding: ``"longest"`` pads a batch to its longest row, ``"max_length"`` to that length.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If a number is out of its range; reading the file, in ``setup``, raises
            it too.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        path: str,
        text_column: str = "text",
        user_column: str | None = "user",
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 256,
        padding: Padding = "longest",
        tokenizer: str = "byte",
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, max_length, padding, tokenizer, num_workers)
        self.source = TextFile(path, text_column, user_column, val_fraction, seed)

    def split(self) -> Split:
        """Read the file and hold users out.

        Returns:
            Documents of the users to train on, and of the users who are held out.
        """
        return self.source.split()


class TextCorpus(CausalTextDataModule):
    """The embedded corpus, or a user's own text once there is a path.

    It lets one recipe run without any file and, with ``--data.path``, on one's own.

    Args:
        path: A file as in :class:`TextDataModule`, or null for the embedded corpus of
            :class:`SyntheticSecrets`.
        text_column: Column of the text; strings.
        user_column: Column that names the user; null makes each row its own user.
        val_fraction: Chance of a user of the file to be held out, strictly between 0 and 1.
        seed: Which users of the file are held out.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest row in tokens, at least 2; the rest of a longer text is dropped.
        padding: ``"longest"`` pads a batch to its longest row, ``"max_length"`` to that length.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser.
        num_workers: Processes that load batches.
        embedded: How the embedded corpus is made.

    Raises:
        ConfigurationError: If a number is out of its range; reading the file, in ``setup``, raises
            it too.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        path: str | None = None,
        text_column: str = "text",
        user_column: str | None = "user",
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 96,
        padding: Padding = "longest",
        tokenizer: str = "byte",
        num_workers: int = 0,
        embedded: SecretsCorpus | None = None,
    ) -> None:
        super().__init__(batch_size, max_length, padding, tokenizer, num_workers)
        self.embedded = embedded or SecretsCorpus()
        self.file = None
        if path is not None:
            self.file = TextFile(path, text_column, user_column, val_fraction, seed)

    def split(self) -> Split:
        """Read the file, or generate the embedded corpus.

        Returns:
            Documents of the users to train on, and of the users who are held out.
        """
        if self.file is not None:
            return self.file.split()
        return split_by_membership(self.embedded.users())
