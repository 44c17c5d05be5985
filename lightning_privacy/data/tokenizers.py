"""From texts to integers and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lightning_privacy.hub import read_tokenizer

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

    def encode_pair(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Turn a prompt and the text behind it into integers, between the marks of both ends.

        Args:
            prompt: What is given; may be empty.
            text: What follows.
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
        prompt, rest = self.encode_pair("", text)
        return [*prompt, *rest]

    def encode_pair(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Turn a prompt and the text behind it into bytes, between the marks of begin and end.

        Args:
            prompt: What is given; may be empty.
            text: What follows.

        Returns:
            The bytes of both, the first led by the mark of begin, the second followed by that of
            end.
        """
        given, rest = (part.encode("utf-8", errors="surrogatepass") for part in (prompt, text))
        return [self.begin_id, *given], [*rest, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn integers back into the text; the marks are dropped.

        Args:
            ids: Integers from 0 to 258.

        Returns:
            The text, with the replacement character where the bytes are no valid UTF-8.
        """
        return bytes(i for i in ids if i < self.begin_id).decode("utf-8", errors="replace")


class PretrainedTokenizer:
    """The Hugging Face tokeniser of a checkpoint.

    Args:
        checkpoint: Folder that ``save_pretrained`` wrote, or an id at the hub. What is sent there
            is the id alone, never a text.

    Raises:
        ConfigurationError: If there is no such folder, it holds no tokeniser, or the hub refuses.
    """

    def __init__(self, checkpoint: str) -> None:
        self._tokenizer = read_tokenizer(checkpoint)
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
        prompt, rest = self.encode_pair("", text)
        return [*prompt, *rest]

    def encode_pair(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Turn a prompt and the text behind it into tokens, between the tokeniser's own marks.

        Args:
            prompt: What is given; may be empty.
            text: What follows.

        Returns:
            The tokens of both, each tokenised by itself.
        """
        begin = [] if self._begin is None else [self._begin]
        end = [] if self._end is None else [self._end]
        return [*begin, *self._tokens(prompt)], [*self._tokens(text), *end]

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

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
        name: ``"byte"``, or a checkpoint as for :class:`PretrainedTokenizer`.

    Returns:
        The tokeniser.

    Raises:
        ConfigurationError: As :class:`PretrainedTokenizer`.
    """
    return ByteTokenizer() if name == "byte" else PretrainedTokenizer(name)
