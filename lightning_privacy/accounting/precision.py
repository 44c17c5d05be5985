"""How far rounding may push a clipped contribution above the clip norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_privacy.errors import GuaranteeError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Iterable

_PRECISION_SLACK = {"64": 1e-9, "32": 1e-4, "bf16": 2e-2}


def precision_slack_for(precision: str) -> float:
    """Returns the relative excess over the clip norm that a precision may cause.

    Worst measured so far: 0.7 per cent in bfloat16. The slack is above that and above the
    analytic excess of the rules used.

    Args:
        precision: Lightning's name ("32-true", "bf16-mixed", "64", ...) or torch's ("float32").

    Returns:
        τ: 1e-9 for 64 bits, 1e-4 for 32, 2e-2 for bfloat16.

    Raises:
        UnsupportedOperationError: No bound is known for this precision.
    """
    name = str(precision).removeprefix("torch.").removesuffix("-true").removesuffix("-mixed")
    name = {"float64": "64", "double": "64", "float32": "32", "float": "32"}.get(name, name)
    name = "bf16" if name == "bfloat16" else name
    if name not in _PRECISION_SLACK:
        raise UnsupportedOperationError(
            must="`precision` must be 64, 32 or bf16 (true or mixed)",
            found=f"`precision` = {precision!r}",
            cost="clipped contributions of unknown norm; with float16 also steps that are skipped "
            "depending on the data",
            remedy="use precision='bf16-mixed' or '32-true'",
        )
    return _PRECISION_SLACK[name]


def require_slack(types: Iterable[object], slack: float) -> None:
    """Refuses gradients of a coarser type than the one that is accounted for.

    Args:
        types: In which types the gradients of units came, as torch names them.
        slack: What is accounted.

    Raises:
        GuaranteeError: One of them may exceed the clip norm by more.
        UnsupportedOperationError: No bound is known for one.
    """
    for kind in types:
        if precision_slack_for(str(kind)) > slack:
            raise GuaranteeError(
                must="gradients are computed in the trainer's precision, or in a finer one",
                found=f"gradients in {kind}, where {slack:.2g} is accounted for rounding",
                cost="contributions above clip_norm by more than the noise covers",
                remedy="pass Trainer(precision='bf16-mixed') or 'bf16-true' where the module is in "
                "bfloat16 or calls torch.autocast itself",
            )
