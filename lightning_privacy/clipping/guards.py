"""What must never happen during private training, watched for.

`LeakGuard`: a gradient that reaches a covered parameter other than through the private step.
`StateGuard`: a buffer or a parameter that changes other than by the private step.
"""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import chain
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence


class LeakGuard:
    """Raises as soon as autograd delivers a raw gradient to one of ``parameters``.

    Every covered use of a parameter is rewritten so that its own gradient stays empty. One that
    arrives all the same is not clipped (a custom autograd function, compiled code, a call of
    `torch.autograd.grad` in some hook): the step ends with an error that names the parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._handles = [
            parameter.register_hook(_refusal(name)) for name, parameter in parameters.items()
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @classmethod
    @contextmanager
    def watching(cls, parameters: Mapping[str, nn.Parameter]) -> Iterator[LeakGuard]:
        """Watch within a ``with`` block."""
        guard = cls(parameters)
        try:
            yield guard
        finally:
            guard.remove()


def _refusal(name: str) -> Callable[[Tensor], None]:
    def refuse(_gradient: Tensor) -> None:
        raise GuaranteeError(
            must="no gradient reaches a trainable parameter except clipped and noised",
            found=f"autograd delivered a raw gradient to {name}: it was used by code that the "
            "capture cannot see, such as a custom autograd.Function, or a backward ran outside "
            "the private step",
            cost="that gradient would be neither clipped nor noised: no guarantee",
            remedy="call the operation on the parameter in plain PyTorch, or freeze the parameter",
        )

    return refuse


class StateGuard:
    """Notices writes to buffers and parameters between two moments.

    What a forward writes into a buffer (batch statistics, moving averages, codebooks, router
    counts) leaves the run in the checkpoint without noise; one that is not saved (a queue of
    earlier embeddings) carries examples into later gradients, which clipping does not bound either.

    Args:
        module: the module to watch.
        independent: names or patterns (``fnmatch``) of buffers and parameters declared to be
            independent of the data.
    """

    def __init__(self, module: nn.Module, independent: Sequence[str] = ()) -> None:
        self._module = module
        self._independent = tuple(independent)
        self._modules: list[tuple[str, nn.Module]] = []
        self._parts: list[nn.Module] = []
        self._inner: list[Mapping[str, nn.Module | None]] = []
        self._tables: list[Mapping[str, Tensor | None]] = []
        self._children: list[nn.Module | None] = []
        self._names: list[str] = []
        self._held: list[Tensor] = []
        self._places: list[int] = []
        self._versions: list[int] = []
        self._values: dict[str, int] = {}
        self._kept: list[Tensor] = []
        self._small: dict[str, Tensor] = {}
        self._small_before = _joined({})
        self._saved: dict[str, int] | None = None

    def held(self, *, anew: bool = False) -> list[Tensor]:
        """All parameters and buffers, once for each place that holds one.

        Every step needs this thrice, and what it costs is reaching for memory: so a module's tables
        of children, parameters and buffers are remembered, and no object is made for a tensor.

        Args:
            anew: ask the modules for their tables, which code may have replaced as a whole.

        Returns:
            The tensors, good for `verify` until anything but this package has run.
        """
        if anew:
            self._find_tables()
        if [*_contents(self._inner)] != self._children or not self._parts:
            self._modules = list(self._module.named_modules(remove_duplicate=False))
            self._parts = [part for _, part in self._modules]
            self._find_tables()
            self._children = [*_contents(self._inner)]
        return [tensor for tensor in _contents(self._tables) if tensor is not None]

    def snapshot(self, *, values: bool = False) -> None:
        """Remember the present state.

        Args:
            values: compare all contents too, not only version counters: a write through ``.data``
                does not move the counter. Costs a pass over the module's memory; the contents of
                the smallest tensors on the CPU are compared in any case.
        """
        if self._saved is None:
            self._saved = self._saved_state()
        held = self.held()
        if values or [*map(id, held)] != [*map(id, self._held)]:
            held = self.held(anew=True)
            self._names = self._names_now()
        self._held, before = held, self._places
        self._places, self._versions = _places_and_versions(held)
        with torch._C.DisableTorchFunctionSubclass():
            if before != self._places:
                # Memory that is held here cannot be given to a tensor that replaces another.
                self._kept = [tensor.detach() for tensor in map(_local, held)]
                self._small = _smallest(self._watched(self._names, held))
            self._small_before = _joined(self._small)
        self._values = _fingerprints(self._watched(self._names, held)) if values else {}

    def verify(self, moment: str, held: list[Tensor] | None = None) -> None:
        """Compare with the last `snapshot`.

        Args:
            moment: when, for the error.
            held: what `held` has just returned; None looks anew.

        Raises:
            GuaranteeError: naming every buffer and parameter that changed.
        """
        with torch._C.DisableTorchFunctionSubclass():
            small = _joined(self._small)
        now = _places_and_versions(self.held(anew=True) if held is None else held)
        same = now == (self._places, self._versions) and small.equal(self._small_before)
        if same and not self._values:
            return
        if changed := self._changed():
            raise _state_changed(moment, changed)

    def _changed(self) -> list[str]:
        """The names of all that differs from the last `snapshot`."""
        held, names = self.held(anew=True), self._names_now()
        before = dict(zip(self._names, zip(self._places, self._versions, strict=True), strict=True))
        after = dict(zip(names, zip(*_places_and_versions(held), strict=True), strict=True))
        tensors = self._watched(names, held)
        every = dict.fromkeys((*self._watched(self._names, self._held), *tensors))
        changed = [name for name in every if before.get(name) != after.get(name)]
        kept = {name: tensors[name] for name in self._values if name not in changed}
        now = _fingerprints(kept)
        changed += [name for name in kept if now[name] != self._values[name]]
        return changed + self._small_changed(self._small.keys() - set(changed))

    def verify_others(self, moving: Iterable[Tensor], moment: str) -> None:
        """Compare all but the parameters that an optimizer steps with the last `snapshot`.

        Args:
            moving: those parameters.
            moment: when, in words.

        Raises:
            GuaranteeError: naming every other parameter and every buffer that changed.
        """
        known = {id(_local(tensor)) for tensor in moving}
        held, names = self.held(), self._names
        before: Iterable[object] = zip(self._places, self._versions, strict=True)
        if [*map(id, held)] != [*map(id, self._held)]:
            places = dict(zip(names, before, strict=True))
            held, names = self.held(anew=True), self._names_now()
            before = map(places.get, names)
        own = [id(_local(tensor)) in known for tensor in held]
        now = zip(*_places_and_versions(held), strict=True)
        rows = zip(names, held, own, before, now, strict=True)
        changed = {name: tensor for name, tensor, moves, a, b in rows if a != b and not moves}
        found = [*self._watched([*changed], [*changed.values()])] if changed else []
        if any(name not in found for name in self._small):
            moved = {name for name, moves in zip(names, own, strict=True) if moves}
            found += self._small_changed(self._small.keys() - moved - set(found))
        if found:
            raise _state_changed(moment, found)

    def verify_saved(self, moment: str, *, parameters: bool = False) -> None:
        """Compare what checkpoints hold besides parameters with the first `snapshot`.

        By contents: averaged weights may be swapped in and out meanwhile.

        Args:
            moment: when, in words.
            parameters: compare these, too, with the last `snapshot`, if that was one of contents.

        Raises:
            GuaranteeError: naming every persistent buffer and extra state that changed.
        """
        before, now = self._saved or {}, self._saved_state()
        if parameters and self._values:
            held, names = self.held(anew=True), self._names_now()
            own = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
            found = {n: t for n, t in self._watched(names, held).items() if n in own}
            before = {**before, **{name: self._values.get(name, 0) for name in found}}
            now = {**now, **_fingerprints(found)}
        changed = [name for name in (*before, *now) if before.get(name) != now.get(name)]
        if changed:
            raise _state_changed(moment, list(dict.fromkeys(changed)))

    def _saved_state(self) -> dict[str, int]:
        """A fingerprint of each persistent buffer and of each module's extra state."""
        buffers, extra = {}, {}
        for prefix, part in self.modules:
            start = f"{prefix}." if prefix else ""
            for name, buffer in part._buffers.items():
                if buffer is not None and name not in part._non_persistent_buffers_set:
                    buffers[start + name] = buffer
            if type(part).get_extra_state is not nn.Module.get_extra_state:
                extra[start + "extra_state"] = hash(pickle.dumps(part.get_extra_state()))
        found = {**_fingerprints(buffers), **extra}
        return {
            name: value
            for name, value in found.items()
            if not any(fnmatch(name, pattern) for pattern in self._independent)
        }

    def _small_changed(self, among: Container[str]) -> list[str]:
        sizes = [len(tensor) for tensor in self._small.values()]
        pairs = zip(self._small.items(), self._small_before.split(sizes), strict=True)
        return [
            name for (name, now), before in pairs if name in among and not torch.equal(now, before)
        ]

    @property
    def values(self) -> dict[str, int]:
        """A fingerprint of each tensor at the last `snapshot` with values; else nothing."""
        return self._values

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """All modules by name; searched anew only when one was added, replaced or removed."""
        self.held(anew=True)
        return self._modules

    def _find_tables(self) -> None:
        tables = [*chain.from_iterable(map(_TABLES, self._parts))]
        self._inner, self._tables = tables[0::3], tables[1::3] + tables[2::3]

    def _names_now(self) -> list[str]:
        """The names of what `held` returns, in its order."""
        return [
            f"{prefix}.{name}" if prefix else name
            for kind in (1, 2)
            for prefix, part in self._modules
            for name, tensor in _TABLES(part)[kind].items()
            if tensor is not None
        ]

    def _watched(self, names: list[str], held: list[Tensor]) -> dict[str, Tensor]:
        return {
            name: _local(tensor)
            for name, tensor in zip(names, held, strict=True)
            if not any(fnmatch(name, pattern) for pattern in self._independent)
        }


_TABLES = attrgetter("_modules", "_parameters", "_buffers")
_Value = TypeVar("_Value")


def _contents(tables: Iterable[Mapping[str, _Value]]) -> Iterator[_Value]:
    """The values of all tables, most of which are empty."""
    return chain.from_iterable(map(methodcaller("values"), filter(None, tables)))


def _local(tensor: Tensor) -> Tensor:
    """Of a tensor that lies on several ranks the part that is here."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _places_and_versions(held: list[Tensor]) -> tuple[list[int], list[int]]:
    with torch._C.DisableTorchFunctionSubclass():
        here = [getattr(tensor, "_local_tensor", tensor) for tensor in held]
        return [tensor.data_ptr() for tensor in here], [tensor._version for tensor in here]


def _smallest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bytes of small tensors in the CPU's memory, as views; buffers first."""
    candidates = [
        (isinstance(tensor, nn.Parameter), tensor.numel(), name)
        for name, tensor in tensors.items()
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel()
    ]
    found: dict[str, Tensor] = {}
    elements = 0
    for _, size, name in sorted(candidates)[:_SMALL_TENSORS]:
        elements += size
        if elements > _SMALL_ELEMENTS:
            break
        found[name] = tensors[name].detach().view(-1).view(torch.uint8)
    return found


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(tensors.values())) if tensors else torch.zeros(0, dtype=torch.uint8)


def _state_changed(moment: str, names: list[str]) -> GuaranteeError:
    return GuaranteeError(
        must="between private optimizer steps no buffer and no parameter changes",
        found=f"changed {moment}: {', '.join(sorted(names)[:8])}",
        cost="what a forward writes there leaves the run in the checkpoint without noise, "
        "or carries one example into later gradients of others: no ε covers it",
        remedy="remove the update (for BatchNorm: GroupNorm); leave averages of the weights to "
        "Lightning's EMAWeightAveraging; or, if nothing in it depends on the data but the trained "
        'weights, name it in independent_buffers, where patterns such as "ema.*" serve',
    )


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """For each tensor a sum over its bits, which any single write changes."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    found: dict[str, int] = {}
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        for names in by_device.values():
            # Brought over together: a GPU would be waited for once for each.
            sums = torch.stack([_sum_of_bits(tensors[name]) for name in names]).tolist()
            found.update(zip(names, sums, strict=True))
    return found


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """One pass over memory, eight bytes at a time, modulo 2**64."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.data_ptr() % _WORD:
        data = data.clone()
    whole = len(data) // _WORD * _WORD
    return data[:whole].view(torch.int64).sum() + data[whole:].sum(dtype=torch.int64)


# How much is compared at every step.
_SMALL_ELEMENTS, _SMALL_TENSORS = 4096, 64
_WORD = 8
