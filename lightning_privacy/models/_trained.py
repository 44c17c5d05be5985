"""Checkpoints of what is trained and nothing else: a frozen base can be read again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models._adapters import require_same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class TrainedOnly(LightningModule):
    """A module whose state is its trainable parameters; `configure_model` brings the rest."""

    def state_dict(  # type: ignore[override]
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """What is trained; a frozen base is left out, as it can be read again.

        Args:
            destination: Where to put it; a new dictionary by default.
            prefix: Of the names.
            keep_vars: Whether to return the parameters themselves.

        Returns:
            Trainable parameters by name.
        """
        found = {} if destination is None else destination
        for name, parameter in self._trained().items():
            found[prefix + name] = parameter if keep_vars else parameter.detach()
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take up what `state_dict` gave; the base is loaded if it is not yet.

        Args:
            state_dict: By name.
            strict: Whether names and shapes have to be those of this model.
            assign: As in torch.

        Returns:
            As in torch, the names that are missing and unexpected.

        Raises:
            ConfigurationError: If names or shapes differ.
        """
        own = self._trained()
        if strict:
            require_same(own, state_dict)
        result: Any = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if name in own]
        return result._replace(missing_keys=missing)

    def _trained(self) -> dict[str, Tensor]:
        self.configure_model()
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def start_from(model: TrainedOnly, path: str, heads: Sequence[str]) -> None:
    """Take up another run's weights, but for the heads of its task.

    Args:
        model: Gets them.
        path: A checkpoint of Lightning, of a model with the same encoders and decoder.
        heads: How names begin that belong to a task; they are left as they are.

    Raises:
        ConfigurationError: If the file is missing, was trained without privacy in study mode, or
            holds another model, or more than plain values.
    """
    if not Path(path).is_file():
        raise _no_start(f"no file '{path}'", "Run the pretraining first, or give its checkpoint.")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _no_start(
            "a file that would run code when it is read", "Give a checkpoint of a fit."
        ) from error
    if "not_private" in held:
        raise _no_start(
            f"one that says '{held['not_private']}'", "Start from a run that was private."
        )
    own = {name: t for name, t in model.state_dict().items() if not name.startswith(tuple(heads))}
    given = {name: t for name, t in held["state_dict"].items() if name in own}
    require_same(own, given)
    model.load_state_dict(given, strict=False)


def _no_start(found: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        must="`initial_weights` is a checkpoint of a private run.",
        found=found[0].upper() + found[1:] + ".",
        cost="Weights that no ε covers would be passed off as private.",
        remedy=remedy,
    )
