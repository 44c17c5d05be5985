"""Trainable tensors that a loss depends on and no parameter of the module is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_privacy.clipping.refusals import outside

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


def require_covered(
    module: nn.Module, covered: Iterable[nn.Parameter], losses: Sequence[Tensor | None]
) -> None:
    """Refuse a loss whose graph ends in a trainable tensor that is not ``covered``.

    A tensor that each forward makes anew (inputs or activations that require gradients, as
    gradient checkpointing on a frozen base has them) cannot be trained and is let pass.

    Args:
        module: searched for the names of what is found.
        covered: the parameters of the private step.
        losses: of two forwards.

    Raises:
        GuaranteeError: naming the tensors, by attribute or by shape.
    """
    first, second = map(_leaves, losses)
    known = set(map(id, covered))
    # Both are alive here, so that the same identity is the same tensor.
    found = [tensor for key, tensor in first.items() if key in second and key not in known]
    if found:
        raise outside([_described(module, tensor) for tensor in found])


def _leaves(loss: Tensor | None) -> dict[int, Tensor]:
    """The leaves of a graph that gradients would be written to."""
    found: dict[int, Tensor] = {}
    if loss is None:
        return found
    if loss.grad_fn is None:
        return {id(loss): loss} if loss.requires_grad else found
    open_nodes: list[Any] = [loss.grad_fn]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        fresh = {following for following, _ in node.next_functions if following} - seen
        seen |= fresh
        open_nodes += fresh
    return found


def _described(module: nn.Module, tensor: Tensor) -> str:
    names = (
        name
        for prefix, part in module.named_modules()
        for attribute, value in vars(part).items()
        for name, held in _held(attribute if not prefix else f"{prefix}.{attribute}", value)
        if held is tensor
    )
    return f"{next(names, 'a tensor')} of shape {tuple(tensor.shape)}"


def _held(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors that an attribute is, or holds one or two levels down."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        yield from ((f"{name}.{inner}", held) for inner, held in value.named_parameters())
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _held(f"{name}[{number}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _held(f"{name}[{key!r}]", item)
