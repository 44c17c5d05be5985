"""What a canary of a language model is made of: random tokens, or a token that nobody else has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_IGNORED_LABEL = -100
_KEYS = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCanaries:
    """Makes token rows like those of a text data set.

    A text canary is ``length`` random tokens. A new-token canary (Panda et al. 2025, arXiv
    2503.06808) ends on one of ``new_tokens`` instead, and is judged by that token alone: nothing
    else in the data teaches the model anything about it.

    Args:
        tokens: The ordinary tokens to draw from, by public knowledge.
        new_tokens: Tokens that the data never hold, by public knowledge; empty for text canaries.
        length: Tokens of a canary.
    """

    tokens: Sequence[int]
    new_tokens: Sequence[int] = ()
    length: int = 16

    def rows(self, count: int, like: Any, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Make canaries.

        Args:
            count: How many.
            like: An example of the data set, whose keys they have.
            generator: Draws them.

        Returns:
            Rows with "input_ids", "labels" and "attention_mask", as far as the example has them.

        Raises:
            ConfigurationError: The example is no row of tokens.
        """
        _require_tokens(like)
        words = torch.tensor(self.tokens)
        found = []
        for _ in range(count):
            ids = words[torch.randint(len(words), (self.length,), generator=generator)]
            labels = ids.clone()
            if len(self.new_tokens):
                place = int(torch.randint(len(self.new_tokens), (), generator=generator))
                ids[-1] = self.new_tokens[place]
                labels = torch.full_like(ids, _IGNORED_LABEL)
                labels[-1] = ids[-1]
            row = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
            found.append({name: row[name] for name in like})
        return found


def _require_tokens(like: Any) -> None:
    if (
        not isinstance(like, dict)
        or not {"input_ids", "labels"} <= like.keys() <= set(_KEYS)
        or like["labels"].shape != like["input_ids"].shape
    ):
        found = sorted(like) if isinstance(like, dict) else type(like).__name__
        raise ConfigurationError(
            must=f"text canaries go among rows with {', '.join(_KEYS)} and a label for each token",
            found=f"an example of {found}",
            cost="canaries that the model cannot read",
            remedy='pass canaries of your own as rows=[...], or use kind="gradient"',
        )
