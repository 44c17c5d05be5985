"""A user's own text: JSON lines, CSV or Parquet, read through Hugging Face datasets.

The file never leaves the machine, and no copy of it stays in a cache folder.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_privacy.data.base import CausalTextDataModule, Document, Padding, Split
from lightning_privacy.data.synthetic import SecretsCorpus, split_by_membership
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# File endings, and the name of the reader in `datasets`.
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
        table = _read(self.path)
        texts = self._column(table, self.text_column, "text_column")
        self._require_strings(texts)
        if self.user_column is None:
            return tuple(Document(_digest(text), text) for text in texts)
        users = self._column(table, self.user_column, "user_column")
        return tuple(
            Document(str(user), text)
            for user, text in zip(self._scalars(users), texts, strict=True)
        )

    def split(self) -> Split:
        """Hold users out.

        Whether a user is held out is a fixed function of that user's own name and the seed, so one
        more or one fewer user changes nothing for the others.

        Returns:
            Documents of the users to train on, and of the users who are held out.

        Raises:
            ConfigurationError: As :meth:`documents`.
        """
        documents = self.documents()
        held_out = {user: self._holds_out(user) for user in {d.user for d in documents}}
        return Split(
            train=tuple(d for d in documents if not held_out[d.user]),
            validation=tuple(d for d in documents if held_out[d.user]),
        )

    def _holds_out(self, user: str) -> bool:
        number = int.from_bytes(bytes.fromhex(_digest(f"{self.seed}\n{user}"))[:8], "big")
        return number < self.val_fraction * 2**64

    def _column(self, table: dict[str, list[Any]], name: str, key: str) -> list[Any]:
        if name in table:
            return table[name]
        raise ConfigurationError(
            must=f"`{key}` names a column of the file.",
            found=f"'{self.path}' has no column '{name}'; it has {', '.join(sorted(table))}.",
            cost="There would be no text to train on, or nobody to attribute it to.",
            remedy=f"Give one of these columns as `{key}`"
            + (", or null where every row is its own user." if key == "user_column" else "."),
        )

    def _require_strings(self, texts: Sequence[object]) -> None:
        for row, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise ConfigurationError(
                    must=f"Every row of the column '{self.text_column}' is a string.",
                    found=f"Row {row} of '{self.path}' holds {_kind(text)}.",
                    cost="It cannot be tokenised, and dropping rows silently would change who is "
                    "protected.",
                    remedy="Clean that row, or give another column as `text_column`.",
                )

    def _scalars(self, users: Sequence[object]) -> Iterator[object]:
        for row, user in enumerate(users, start=1):
            if user is None or isinstance(user, list | dict):
                raise ConfigurationError(
                    must=f"Every row of the column '{self.user_column}' names one user.",
                    found=f"Row {row} of '{self.path}' holds {_kind(user)}.",
                    cost="A row of nobody could fall on both sides of the split, and no user-level "
                    "statement would hold for it.",
                    remedy="Clean that row, or give another column as `user_column`.",
                )
            yield user


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


def _read(path: str) -> dict[str, list[Any]]:
    reader = _require_readable(path)
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    read = {"json": Dataset.from_json, "csv": Dataset.from_csv, "parquet": Dataset.from_parquet}
    # A cache in the home folder would keep the private text after the run.
    with tempfile.TemporaryDirectory() as cache, _quiet():
        try:
            dataset = read[reader](path, cache_dir=cache, keep_in_memory=True)
            return {name: list(dataset[name]) for name in dataset.column_names}
        except (DatasetGenerationError, ValueError, OSError) as error:
            if "corresponds to no data" in str(error):  # the reader's words for no rows
                raise _no_rows(path) from error
            reason = str(error.__cause__ or error).rstrip()
            raise ConfigurationError(
                must=f"'{path}' is a table of the kind that its ending promises.",
                found=f"It cannot be read: {reason}",
                cost="There is no text to train on.",
                remedy="Write one row per document (JSON lines: one object per line), every row "
                "with the same columns and types.",
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _require_readable(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(
            must="`path` is an existing file.",
            found=f"There is no file '{path}'.",
            cost="There is no text to train on.",
            remedy="Correct the path; relative paths start in the working directory.",
        )
    ending = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if ending not in _READERS:
        raise ConfigurationError(
            must=f"The file ends in {', '.join(_READERS)}, optionally followed by .gz.",
            found=f"'{path}' ends in '{file.suffix}'.",
            cost="It is not clear how to read it.",
            remedy="Convert the file, for instance to JSON lines, or correct its ending.",
        )
    if file.stat().st_size == 0:
        raise _no_rows(path)
    return _READERS[ending]


def _no_rows(path: str) -> ConfigurationError:
    return ConfigurationError(
        must="The file has at least one row.",
        found=f"'{path}' is empty.",
        cost="There is no text to train on.",
        remedy="Give a file with one document per row.",
    )


def _digest(text: str) -> str:
    encoded = text.encode("utf-8", errors="surrogatepass")
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__} ({str(value)[:40]!r})"
