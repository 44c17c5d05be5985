"""Prompts with answers, and texts with a class, for the fine-tuning of a checkpoint.

The tokeniser is that of the checkpoint. What is given, a prompt, is not learnt.
"""

from __future__ import annotations

from string import Formatter
from typing import TYPE_CHECKING

from lightning_privacy.data.base import (
    CausalTextDataModule,
    Document,
    DocumentDataModule,
    LabelledDocuments,
    Padding,
    Split,
)
from lightning_privacy.data.tables import Table, kind_of, read_table, split_by_user
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import real_number

if TYPE_CHECKING:
    from collections.abc import Sequence


class InstructionDataModule(CausalTextDataModule):
    """Texts, or answers to prompts, from a table.

    Prompt and answer are templates: text in which ``{name}`` stands for the column of that name.
    The loss is that of the answer alone.

    Args:
        path: A file ending in .jsonl, .json, .csv or .parquet, optionally followed by .gz; or
            ``hub:NAME`` or ``hub:NAME:SPLIT`` for a data set of the Hugging Face hub.
        text_template: What is learnt.
        prompt_template: What stands before it and is given; null for none.
        user_column: Column that names the user; null makes each row its own user.
        val_fraction: Chance of a user to be held out, strictly between 0 and 1.
        seed: Which users are held out.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest row in tokens, at least 2. Prompt and text that are longer are cut: the
            text keeps at least half of the row, and of the prompt its end is kept.
        padding: ``"longest"`` pads a batch to its longest row, ``"max_length"`` to that length.
        tokenizer: A folder or hub id; on the command line by default the model's checkpoint.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If an argument is out of its range; reading the table, in ``setup``,
            raises it too.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        path: str,
        text_template: str = "{text}",
        prompt_template: str | None = None,
        user_column: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 4,
        max_length: int = 512,
        padding: Padding = "longest",
        tokenizer: str | None = None,
        num_workers: int = 0,
    ) -> None:
        tokenizer = _require_named(tokenizer)
        super().__init__(batch_size, max_length, padding, tokenizer, num_workers)
        _require_share(val_fraction)
        self.path = path
        self.text_template = text_template
        self.prompt_template = prompt_template
        self.user_column = user_column
        self.val_fraction = val_fraction
        self.seed = seed

    def split(self) -> Split:
        """Read the table and hold users out.

        Returns:
            Documents of the users to train on, and of the users who are held out.
        """
        table = read_table(self.path)
        texts = filled(table, self.text_template, "text_template")
        prompts = [""] * len(texts)
        if self.prompt_template is not None:
            prompts = filled(table, self.prompt_template, "prompt_template")
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        users = table.users(self.user_column, whole)
        documents = [Document(*row) for row in zip(users, texts, prompts, strict=True)]
        return split_by_user(documents, self.val_fraction, self.seed)


class ClassificationDataModule(DocumentDataModule):
    """Texts with a class each, from a table.

    The classes are given, not collected: which ones occur is a property of private data.

    Args:
        path: As in :class:`InstructionDataModule`.
        labels: The classes as they stand in the table, written as strings; the model's class i is
            the i-th of them.
        text_column: Column of the text; strings.
        label_column: Column of the class.
        drop_unlabelled: Whether rows without a class are left out; else they are refused.
        user_column: Column that names the user; null makes each row its own user.
        val_fraction: Chance of a user to be held out, strictly between 0 and 1.
        seed: Which users are held out.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest row in tokens, at least 2; the rest of a longer text is dropped.
        padding: ``"longest"`` pads a batch to its longest row, ``"max_length"`` to that length.
        tokenizer: A folder or hub id; on the command line by default the model's checkpoint.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If an argument is out of its range; reading the table, in ``setup``,
            raises it too.
    """

    task = "classification"
    items = LabelledDocuments

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        path: str,
        labels: list[str],
        text_column: str = "text",
        label_column: str = "label",
        drop_unlabelled: bool = False,
        user_column: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 16,
        max_length: int = 128,
        padding: Padding = "longest",
        tokenizer: str | None = None,
        num_workers: int = 0,
    ) -> None:
        tokenizer = _require_named(tokenizer)
        super().__init__(batch_size, max_length, padding, tokenizer, num_workers)
        _require_share(val_fraction)
        _require_different(labels)
        self.path = path
        self.labels = tuple(labels)
        self.text_column = text_column
        self.label_column = label_column
        self.drop_unlabelled = drop_unlabelled
        self.user_column = user_column
        self.val_fraction = val_fraction
        self.seed = seed

    @property
    def num_labels(self) -> int:
        """How many classes there are; the model needs as many."""
        return len(self.labels)

    def split(self) -> Split:
        """Read the table and hold users out.

        Returns:
            Documents of the users to train on, and of the users who are held out.
        """
        table = read_table(self.path)
        texts = table.strings(self.text_column, "text_column")
        users = table.users(self.user_column, texts)
        classes = table.column(self.label_column, "label_column")
        documents = [
            Document(user, text, label=self._number_of(value, row))
            for row, (user, text, value) in enumerate(zip(users, texts, classes, strict=True), 1)
            if not (value is None and self.drop_unlabelled)
        ]
        return split_by_user(documents, self.val_fraction, self.seed)

    def _number_of(self, value: object, row: int) -> int:
        name = str(value)
        if value is not None and name in self.labels:
            return self.labels.index(name)
        raise ConfigurationError(
            must=f"Every row of the column '{self.label_column}' holds one of the classes "
            f"{', '.join(self.labels)}.",
            found=f"Row {row} of '{self.path}' holds {kind_of(value)}.",
            cost="Leaving rows out silently would change who is protected.",
            remedy="Set `drop_unlabelled` to true." if value is None else "Add it to `labels`.",
        )


def filled(table: Table, template: str, key: str) -> list[str]:
    """Fill a template with the columns that it names, row by row.

    Args:
        table: The table.
        template: Text with column names in braces.
        key: The argument that holds the template, for messages.

    Returns:
        One text per row.

    Raises:
        ConfigurationError: If it names no column, or one that does not exist or holds no strings.
    """
    names = _columns_in(template, key)
    columns = [table.strings(name, key) for name in names]
    rows = zip(*columns, strict=True)
    return [template.format_map(dict(zip(names, row, strict=True))) for row in rows]


def _columns_in(template: str, key: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        names = []
    if not names:
        raise ConfigurationError(
            must=f"`{key}` names at least one column in braces, like {{text}}.",
            found=f"{template!r}",
            cost="Every example would be the same.",
            remedy="Write the name of a column in braces; a brace of the text itself is doubled.",
        )
    return list(dict.fromkeys(names))


def _require_named(tokenizer: str | None) -> str:
    if tokenizer is not None:
        return tokenizer
    raise ConfigurationError(
        must="The data have the tokeniser of the checkpoint that is trained.",
        found="`tokenizer` is null, and there is no model with a `checkpoint` to take it from.",
        cost="The tokens would mean nothing to the model.",
        remedy="Give `tokenizer`: the folder or hub id of the checkpoint, or 'byte'.",
    )


def _require_share(val_fraction: float) -> None:
    real_number(
        "val_fraction",
        val_fraction,
        "(0, 1)",
        cost="There would be nothing to train on, or nothing to validate on.",
        remedy="Give the share of users to hold out, for instance 0.1.",
    )


def _require_different(labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigurationError(
            must="`labels` are at least two different classes.",
            found=f"{list(labels)}.",
            cost="There would be nothing to tell apart.",
            remedy='List the classes as they stand in the table, for instance ["0", "1"].',
        )
