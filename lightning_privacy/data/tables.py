"""Tables of texts, read through Hugging Face datasets: from files, or from the hub.

A file never leaves the machine, and no copy of it stays in a cache folder.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_privacy.data.base import Document, Split
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# File endings, and the name of the reader in `datasets`.
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HUB = "hub:"


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a file, and clear refusals of what is not in it.

    Args:
        path: Where it was read.
        columns: The values of each column, in the order of the rows.
    """

    path: str
    columns: dict[str, list[Any]]

    def column(self, name: str, key: str) -> list[Any]:
        """Look a column up.

        Args:
            name: Of the column.
            key: The argument that named it, for the message.

        Returns:
            Its values.

        Raises:
            ConfigurationError: If there is none of that name.
        """
        if name in self.columns:
            return self.columns[name]
        raise ConfigurationError(
            must=f"`{key}` names a column of the file.",
            found=f"'{self.path}' has no column '{name}'; it has "
            f"{', '.join(sorted(self.columns))}.",
            cost="There would be no text to train on, or nobody to attribute it to.",
            remedy=f"Give one of these columns as `{key}`"
            + (", or null where every row is its own user." if key == "user_column" else "."),
        )

    def strings(self, name: str, key: str) -> list[str]:
        """Look a column of strings up.

        Args:
            name: Of the column.
            key: The argument that named it, for the message.

        Returns:
            Its values.

        Raises:
            ConfigurationError: If there is none of that name, or a value is no string.
        """
        texts = self.column(name, key)
        for row, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise ConfigurationError(
                    must=f"Every row of the column '{name}' is a string.",
                    found=f"Row {row} of '{self.path}' holds {kind_of(text)}.",
                    cost="It cannot be tokenised, and dropping rows silently would change who is "
                    "protected.",
                    remedy=f"Clean that row, or give another column as `{key}`.",
                )
        return texts

    def users(self, name: str | None, texts: Sequence[str]) -> list[str]:
        """Name the user of each row.

        Args:
            name: The column of the users; None makes each row its own user.
            texts: What each row says, to name it by where there is no column.

        Returns:
            One name per row.

        Raises:
            ConfigurationError: If there is no such column, or a row names nobody.
        """
        if name is None:
            return [_digest(text) for text in texts]
        users = self.column(name, "user_column")
        for row, user in enumerate(users, start=1):
            if user is None or isinstance(user, list | dict):
                raise ConfigurationError(
                    must=f"Every row of the column '{name}' names one user.",
                    found=f"Row {row} of '{self.path}' holds {kind_of(user)}.",
                    cost="A row of nobody could fall on both sides of the split, and no user-level "
                    "statement would hold for it.",
                    remedy="Clean that row, or give another column as `user_column`.",
                )
        return [str(user) for user in users]


def read_table(path: str) -> Table:
    """Read a whole table.

    Args:
        path: A file ending in .jsonl, .json, .csv or .parquet, optionally followed by .gz; or
            ``hub:NAME`` or ``hub:NAME:SPLIT`` for a data set of the Hugging Face hub (split
            "train"), which is kept in the cache of `datasets`.

    Returns:
        The table.

    Raises:
        ConfigurationError: If it is missing, empty or unreadable.
    """
    if path.startswith(_HUB):
        return Table(path, _read_from_hub(path))
    return Table(path, _read_file(path))


def split_by_user(documents: Sequence[Document], val_fraction: float, seed: int) -> Split:
    """Hold users out.

    Whether a user is held out is a fixed function of that user's own name and the seed, so one more
    or one fewer user changes nothing for the others.

    Args:
        documents: Of all users.
        val_fraction: Chance of a user to be held out.
        seed: Which users are held out.

    Returns:
        Documents of the users to train on, and of the users who are held out.
    """

    def holds_out(user: str) -> bool:
        number = int.from_bytes(bytes.fromhex(_digest(f"{seed}\n{user}"))[:8], "big")
        return number < val_fraction * 2**64

    held_out = {user: holds_out(user) for user in {d.user for d in documents}}
    return Split(
        train=tuple(d for d in documents if not held_out[d.user]),
        validation=tuple(d for d in documents if held_out[d.user]),
    )


def kind_of(value: object) -> str:
    """Describe a value for a message.

    Args:
        value: Any.

    Returns:
        Its type and its beginning.
    """
    return "nothing" if value is None else f"a {type(value).__name__} ({str(value)[:40]!r})"


def _read_file(path: str) -> dict[str, list[Any]]:
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


def _read_from_hub(path: str) -> dict[str, list[Any]]:
    from datasets import load_dataset

    name, _, part = path.removeprefix(_HUB).partition(":")
    with _quiet():
        try:
            dataset = load_dataset(name, split=part or "train")
        except (ValueError, OSError) as error:
            raise ConfigurationError(
                must=f"'{name}' is a data set at the Hugging Face hub with a split "
                f"'{part or 'train'}'.",
                found=f"It cannot be read: {str(error).strip()[:400]}",
                cost="There is no text to train on.",
                remedy="Correct the name or the split, as in hub:owner/name:train; for a private "
                "data set log in with `hf auth login`.",
            ) from error
    return {column: list(dataset[column]) for column in dataset.column_names}


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
