"""From texts to integers and back, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tokenizer(Protocol):
    """Turns a text into integers and back; knows nothing of batches."""

    @property
    def vocab_size(self) -> int:
        """How many different integers there are; each is below this number."""

    @property
    def pad_id(self) -> int:
        """The integer that fills a row up."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into integers, with its marks of beginning and end.

        Args:
            text: Any text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Turn integers back into the text, without the marks.

        Args:
            ids: What :meth:`encode` returned.
        """


class ByteTokenizer:
    """One token per UTF-8 byte, with marks for begin, end and padding.

    Its vocabulary is a constant of the format. A vocabulary that was counted on private text would
    be an output of that text, which no ε covers.
    """

    vocab_size = 259
    begin_id = 256
    end_id = 257
    pad_id = 258

    def encode(self, text: str) -> list[int]:
        """Turn a text into its bytes between the marks of begin and end.

        Args:
            text: Any text.

        Returns:
            Integers from 0 to 257, two more than the text has bytes.
        """
        return [self.begin_id, *text.encode("utf-8", errors="surrogatepass"), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn integers back into the text; the marks are dropped.

        Args:
            ids: Integers from 0 to 258.

        Returns:
            The text, with the replacement character where the bytes are no valid UTF-8.
        """
        return bytes(i for i in ids if i < self.begin_id).decode("utf-8", errors="replace")


class PretrainedTokenizer:
    """A Hugging Face tokeniser from a local folder; nothing is downloaded.

    Args:
        path: Folder that ``save_pretrained`` wrote.

    Raises:
        ConfigurationError: If the folder does not exist or holds no tokeniser.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_dir():
            raise ConfigurationError(
                must="`tokenizer` is 'byte' or a local folder that holds a Hugging Face tokeniser.",
                found=f"'{path}' is no folder.",
                cost="Nothing is downloaded during a private run, so there is no text to train on.",
                remedy="Save the tokeniser with `save_pretrained` and give that folder.",
            )
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                must="The folder given as `tokenizer` holds a Hugging Face tokeniser.",
                found=f"'{path}' could not be read as one: {error}",
                cost="There is no text to train on.",
                remedy="Save the tokeniser with `save_pretrained` and give that folder.",
            ) from error
        self._begin = self._tokenizer.bos_token_id
        self._end = self._tokenizer.eos_token_id

    @property
    def vocab_size(self) -> int:
        """How many different integers there are, added tokens included."""
        return len(self._tokenizer)

    @property
    def pad_id(self) -> int:
        """The padding token, or the end mark where the tokeniser has none."""
        if self._tokenizer.pad_token_id is not None:
            return int(self._tokenizer.pad_token_id)
        return int(self._end or 0)

    def encode(self, text: str) -> list[int]:
        """Turn a text into tokens, with the tokeniser's own marks of begin and end.

        Args:
            text: Any text.

        Returns:
            The tokens.
        """
        ids = self._tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        begin = [] if self._begin is None else [self._begin]
        end = [] if self._end is None else [self._end]
        return [*begin, *ids, *end]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn tokens back into the text; special tokens are dropped.

        Args:
            ids: Tokens.

        Returns:
            The text.
        """
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def tokenizer_for(name: str) -> Tokenizer:
    """Make the tokeniser that a recipe names.

    Args:
        name: ``"byte"``, or a local folder that holds a Hugging Face tokeniser.

    Returns:
        The tokeniser.

    Raises:
        ConfigurationError: If the folder does not exist or holds no tokeniser.
    """
    return ByteTokenizer() if name == "byte" else PretrainedTokenizer(name)
