"""Which noise a call of an attention layer gets: fresh in a forward, the same when computed again.

The key of a matrix is made from the seed of the run, the step, the layer, and how many calls of the
layer came before in that step. A checkpoint computes its block again during the backward: there the
last call's key is given once more. Nothing of the data enters a key.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_privacy.attention.counter import Seed, noise_matrix
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

Where = Literal["logits", "weights"]
Method = Literal["auto", "dense", "flex"]

# Rows and queries that the size of the perturbation is measured on, at most.
_MEASURED = 8


def _never() -> bool:
    return False


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Injection:
    """What all noised layers of a model share.

    Attributes:
        where: noise on the "logits", before the softmax, or on the "weights" after it.
        std: the present standard deviation; 0 leaves the attention as it is.
        at_inference: whether layers in evaluation mode get noise, too.
        method: how the noise of logits is made: as a "dense" matrix, or inside a kernel by "flex";
            "auto" chooses by the device.
        seed: of the run.
        quiet: asked at each call whether to leave it alone, as a check of independence wants.
        layers: the noised layers.
    """

    where: Where = "logits"
    std: float = 0.0
    at_inference: bool = False
    method: Method = "auto"
    seed: int = 0
    quiet: Callable[[], bool] = _never
    layers: list[LayerNoise] = dataclasses.field(default_factory=list)
    _step: object = None

    def layer(self, name: str) -> LayerNoise:
        """A further layer.

        Args:
            name: its name in the model; part of the key.

        Returns:
            The noise of that layer.
        """
        self.layers.append(LayerNoise(self, name))
        return self.layers[-1]

    def flexible(self, device: torch.device) -> bool:
        """Whether noise on logits is made inside the kernel there."""
        return self.method == "flex" or (self.method == "auto" and device.type == "cuda")

    def begin(self, step: object, *, measuring: bool = True) -> None:
        """A step begins. The same step begun again, in the same run, gives the same noise.

        Args:
            step: what tells it from all others, of equal ``repr``.
            measuring: whether to measure the perturbation, for which a GPU waits; without, the last
                one stands.
        """
        self._step = step
        for layer in self.layers:
            layer.calls = layer.waiting = 0
            layer.measured = None if measuring else layer.measured

    def after_backward(self) -> None:
        """What was waiting for its backward has had it."""
        for layer in self.layers:
            layer.waiting = 0

    def key(self, layer: str, call: int) -> int:
        """The key of one matrix, 64 bits."""
        text = repr((self.seed, self._step, layer, call))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def perturbation(self) -> Tensor | None:
        """The mean over layers of how far the noise moved attention when it was last measured.

        Returns:
            A scalar, `LayerNoise.measure`; None if no layer was noised.
        """
        found = [layer.measured for layer in self.layers if layer.measured is not None]
        return torch.stack([value.to(found[0].device) for value in found]).mean() if found else None


class LayerNoise:
    """The noise of one attention layer: what an own attention module is given.

    Such a module has an attribute ``attention_noise``, None by default, and whenever it is not None
    calls `on_logits` before the softmax and `on_weights` after it. Both give back what they got
    unless noise is due there.

    Attributes:
        name: of the layer in the model.
        calls: made in this step so far.
        reached: whether any call ever asked for noise.
        measured: how far noise moved attention when it was last measured; None if never.
    """

    __slots__ = ("calls", "injection", "measured", "name", "reached", "waiting")

    def __init__(self, injection: Injection, name: str) -> None:
        self.injection, self.name = injection, name
        self.calls = self.waiting = 0
        self.reached = False
        self.measured: Tensor | None = None

    # Compiled code would keep the numbers of its first call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def due(self, training: bool) -> bool:
        """Whether a call is to be noised.

        Args:
            training: the module's mode.

        Returns:
            The answer.
        """
        shared = self.injection
        return (training or shared.at_inference) and shared.std > 0 and not shared.quiet()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def seed(self, device: torch.device) -> tuple[Seed, bool]:
        """The seed of the present call, and whether that call was not made before.

        Args:
            device: where the noise is made.

        Returns:
            The seed; False if this is the recomputation of a call.

        Raises:
            UnsupportedOperationError: the layer was called several times, and it cannot be known
                which call is computed again.
        """
        fresh = torch._C._current_graph_task_id() == -1
        if fresh:
            self.calls += 1
            self.waiting += 1
        elif self.waiting > 1:
            raise UnsupportedOperationError(
                must="under gradient checkpointing an attention layer is called once between two "
                "backward passes",
                found=f"{self.name} was called {self.waiting} times before its backward",
                cost="the recomputation would not know which noise the forward had, and gradients "
                "would be silently wrong",
                remedy="switch gradient checkpointing off, or leave the layer out by layers=",
            )
        self.reached = True
        return Seed.of(self.injection.key(self.name, max(0, self.calls - 1)), device), fresh

    def std(self, like: Tensor) -> Tensor:
        """The standard deviation as a scalar on the device of ``like``."""
        return torch.full((), self.injection.std, dtype=torch.float32, device=like.device)

    # ------------------------------------------------------------------ own attention modules
    def on_logits(
        self, logits: Tensor, first_key: Tensor | None = None, *, training: bool = True
    ) -> Tensor:
        """Attention logits ``[B, H, Q, K]``, noised if that is what is configured.

        Args:
            logits: as they enter the softmax; masks may have been added or come later.
            first_key: ``[B]``, where each example begins in a batch padded on the left.
            training: the module's mode.

        Returns:
            The logits.
        """
        if self.injection.where != "logits" or not self.due(training):
            return logits
        noise = self._matrix(logits, first_key)
        if self.measured is None:
            self.measure(*_some(logits, noise))
        return logits + noise

    def on_weights(
        self, weights: Tensor, first_key: Tensor | None = None, *, training: bool = True
    ) -> Tensor:
        """Attention weights ``[B, H, Q, K]``, noised if that is what is configured.

        Args:
            weights: after the softmax. Weights that are exactly zero are masked, and stay zero.
            first_key: as in `on_logits`.
            training: the module's mode.

        Returns:
            The weights; they need not add up to one, and some may be negative.
        """
        if self.injection.where != "weights" or not self.due(training):
            return weights
        noise = self._matrix(weights, first_key) * (weights != 0)
        if self.measured is None:
            self.measured = noise.detach().float().abs().sum(-1).mean() / 2
        return weights + noise

    def _matrix(self, like: Tensor, first_key: Tensor | None) -> Tensor:
        seed, _ = self.seed(like.device)
        rows, heads, queries, keys = like.shape
        noise = noise_matrix(seed, (rows, heads, queries, keys), first_key)
        return noise.mul_(self.injection.std).to(like.dtype)

    # ------------------------------------------------------------------ how much it was
    @torch.no_grad()
    def measure(self, logits: Tensor, noise: Tensor) -> None:
        """Note how far noise moves attention: the mean total variation distance over queries.

        Zero is no change, one is attention to entirely other keys. Computed on private data, so not
        covered by any ε.

        Args:
            logits: ``[..., K]``, with masks as infinities or very negative numbers.
            noise: what is added to them.
        """
        clean, noisy = (x.float().softmax(-1) for x in (logits, logits + noise))
        distance = (clean - noisy).abs().sum(-1) / 2
        self.measured = torch.nan_to_num(distance).mean()


def sampled(count: int, device: torch.device) -> Tensor:
    """A few of ``count`` positions, evenly spread."""
    step = max(1, count // _MEASURED)
    return torch.arange(count - 1, -1, -step, device=device)[:_MEASURED].flip(0)


@torch.no_grad()
def _some(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    rows, queries = (sampled(logits.shape[at], logits.device) for at in (0, 2))
    return logits[rows][:, :, queries], noise[rows][:, :, queries]
