"""Checkpoints of what is trained and nothing else: a frozen base can be read again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning import LightningModule

from lightning_privacy.models._adapters import require_same

if TYPE_CHECKING:
    from collections.abc import Mapping

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
