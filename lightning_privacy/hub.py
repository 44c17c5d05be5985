"""Checkpoints of transformers, in a local folder or at the Hugging Face hub, with clear refusals.

Only public things are fetched here: a configuration or a tokeniser. What the hub learns is which.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

_COST = "There is nothing to start from."


def read_config(checkpoint: str) -> Any:
    """Read a checkpoint's configuration; no weights are loaded.

    Args:
        checkpoint: A folder that ``save_pretrained`` wrote, or an id at the hub.

    Returns:
        The configuration of transformers.

    Raises:
        ConfigurationError: If there is no such folder, the hub refuses or cannot be reached, or the
            configuration cannot be read.
    """
    _require_folder_or_id(checkpoint, "checkpoint", "config.json")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise refusal_of(error, checkpoint, "a model") from error


def read_tokenizer(checkpoint: str) -> Any:
    """Read a checkpoint's tokeniser.

    Args:
        checkpoint: A folder that ``save_pretrained`` wrote, or an id at the hub.

    Returns:
        The tokeniser of transformers.

    Raises:
        ConfigurationError: As :func:`read_config`.
    """
    _require_folder_or_id(checkpoint, "tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise refusal_of(error, checkpoint, "a tokeniser") from error


def refusal_of(error: BaseException, checkpoint: str, what: str) -> ConfigurationError:
    """Say what an error of the hub's client or of transformers means for a user.

    Args:
        error: What was raised.
        checkpoint: What was to be loaded.
        what: What of it, for the message.

    Returns:
        The refusal, to be raised from ``error``.
    """
    from huggingface_hub import errors

    chain = list(_behind(error))

    def behind(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if behind(errors.GatedRepoError):
        found = f"The hub refuses '{checkpoint}': its licence has to be accepted, and no access "
        found += "token of an account that did so was sent."
        remedy = f"Accept the licence on the page of '{checkpoint}' at the hub, then log in with "
        remedy += "`hf auth login` or set the variable HF_TOKEN; or give a local folder."
    elif behind(errors.RepositoryNotFoundError):
        found = f"The hub has no '{checkpoint}', or none that the access token may read."
        remedy = "Correct the id; for a private one log in with `hf auth login` or set HF_TOKEN."
    elif behind(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        found = f"'{checkpoint}' is no local folder, and the hub cannot be reached (no network, or "
        found += "HF_HUB_OFFLINE is set)."
        remedy = "Give the path of a local folder, or go online once to fill the cache."
    else:
        found = f"'{checkpoint}' could not be read as one: {str(error).strip()[:400]}"
        remedy = "Give a folder that `save_pretrained` wrote, or correct the id."
    return ConfigurationError(
        must=f"The checkpoint is a local folder, or an id at the Hugging Face hub, with {what}.",
        found=found,
        cost=_COST,
        remedy=remedy,
    )


def _require_folder_or_id(checkpoint: str, key: str, needed: str = "") -> None:
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if needed and not (folder / needed).is_file():
            raise ConfigurationError(
                must=f"A folder given as `{key}` was written by `save_pretrained`.",
                found=f"There is no '{needed}' in '{checkpoint}'.",
                cost=_COST,
                remedy="Give the folder that holds it; original Llama weights have to be converted "
                "to the format of transformers first.",
            )
        return
    # An id is "name" or "owner/name"; what only a path can be is never sent to the hub.
    if checkpoint.startswith((".", "~", "/", "\\")) or checkpoint.count("/") > 1:
        raise ConfigurationError(
            must=f"`{key}` is an existing folder, or an id at the Hugging Face hub.",
            found=f"There is no folder '{checkpoint}'.",
            cost=_COST,
            remedy="Correct the path; relative paths start in the working directory.",
        )


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
