"""What must never happen during private training, watched for.

`LeakGuard`: a gradient that reaches a covered parameter other than through the private step.
`StateGuard`: a buffer or a parameter that changes other than by the private step.
"""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import TYPE_CHECKING

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
        self._entries: list[_Entry] = []
        self._versions: list[tuple[int, int]] = []
        self._values: dict[str, int] = {}
        self._held: list[Tensor] = []
        self._small: dict[str, Tensor] = {}
        self._small_before = _joined({})
        self._saved: dict[str, int] | None = None

    def snapshot(self, *, values: bool = False) -> None:
        """Remember the present state.

        Args:
            values: compare all contents too, not only version counters: a write through ``.data``
                does not move the counter. Costs a pass over the module's memory; the contents of
                the smallest tensors on the CPU are compared in any case.
        """
        if self._saved is None:
            self._saved = self._saved_state()
        self._entries = self._walk()
        before, self._versions = self._versions, _versions(self._entries)
        with torch._C.DisableTorchFunctionSubclass():
            if [where for where, _ in before] != [where for where, _ in self._versions]:
                # Memory that is held here cannot be given to a tensor that replaces another.
                self._held = [tensor.detach() for _, _, tensor in self._entries]
                self._small = _smallest(self._watched(self._entries))
            self._small_before = _joined(self._small)
        watched = self._watched(self._entries) if values else {}
        self._values = _fingerprints(watched)

    def verify(self, moment: str) -> None:
        """Compare with the last `snapshot`.

        Raises:
            GuaranteeError: naming every buffer and parameter that changed.
        """
        entries = self._walk()
        versions = _versions(entries)
        with torch._C.DisableTorchFunctionSubclass():
            small = _joined(self._small)
        if versions == self._versions and small.equal(self._small_before) and not self._values:
            return
        before = dict(zip(_names(self._entries), self._versions, strict=True))
        after = dict(zip(_names(entries), versions, strict=True))
        tensors = self._watched(entries)
        names = dict.fromkeys((*self._watched(self._entries), *tensors))
        changed = [name for name in names if before.get(name) != after.get(name)]
        kept = {name: tensors[name] for name in self._values if name not in changed}
        now = _fingerprints(kept)
        changed += [name for name in kept if now[name] != self._values[name]]
        changed += self._small_changed(self._small.keys() - set(changed))
        if changed:
            raise _state_changed(moment, changed)

    def verify_others(self, moving: Iterable[Tensor], moment: str) -> None:
        """Compare all but the parameters that an optimizer steps with the last `snapshot`.

        Args:
            moving: those parameters.
            moment: when, in words.

        Raises:
            GuaranteeError: naming every other parameter and every buffer that changed.
        """
        known = {id(getattr(tensor, "_local_tensor", tensor)) for tensor in moving}
        before = dict(zip(map(_place, self._entries), self._versions, strict=True))
        entries = self._walk()
        after = zip(entries, _versions(entries), strict=True)
        changed = [e for e, now in after if id(e[2]) not in known and before.get(e[:2]) != now]
        names = list(self._watched(changed)) if changed else []
        if any(name not in names for name in self._small):
            own = set(_names([entry for entry in entries if id(entry[2]) in known]))
            names += self._small_changed(self._small.keys() - own - set(names))
        if names:
            raise _state_changed(moment, names)

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
            own = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
            found = {n: t for n, t in self._watched(self._walk()).items() if n in own}
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
        """All modules by name; searched anew only when one was added or removed."""
        if sum(len(part._modules) for _, part in self._modules) != len(self._modules) - 1:
            self._modules = list(self._module.named_modules(remove_duplicate=False))
        return self._modules

    def _walk(self) -> list[_Entry]:
        """All parameters and buffers. Every step does this thrice, so nothing is formatted here."""
        return [
            # Of a tensor that lies on several ranks, the part that is here.
            (prefix, name, getattr(tensor, "_local_tensor", tensor))
            for prefix, part in self.modules
            for held in (part._parameters, part._buffers)
            if held
            for name, tensor in held.items()
            if tensor is not None
        ]

    def _watched(self, entries: list[_Entry]) -> dict[str, Tensor]:
        return {
            name: entry[2]
            for name, entry in zip(_names(entries), entries, strict=True)
            if not any(fnmatch(name, pattern) for pattern in self._independent)
        }


_Entry = tuple[str, str, Tensor]


def _place(entry: _Entry) -> tuple[str, str]:
    return entry[:2]


def _names(entries: list[_Entry]) -> list[str]:
    return [f"{prefix}.{name}" if prefix else name for prefix, name, _ in entries]


def _versions(entries: list[_Entry]) -> list[tuple[int, int]]:
    with torch._C.DisableTorchFunctionSubclass():
        return [(tensor.data_ptr(), tensor._version) for _, _, tensor in entries]


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
        remedy="remove the update (for BatchNorm: GroupNorm) or, if it does not depend on "
        "the data, name it in independent_buffers",
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
