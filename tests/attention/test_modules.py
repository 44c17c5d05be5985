"""Noise in torch's own attention, in users of its kernel, and in modules that add it themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_privacy.attention import Injection, LayerNoise, find, inject
from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.errors import ConfigurationError

ROWS, LENGTH, WIDTH, HEADS = 3, 7, 16, 4


class Heads(nn.Module):
    """What the modules below share."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.back = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1)]

    def join(self, x: Tensor) -> Tensor:
        return self.back(x.transpose(1, 2).flatten(2))


class Kernel(Heads):
    """Calls torch's kernel, by a name of its own, in a function inside its forward."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(parts: list[Tensor]) -> Tensor:
            return scaled_dot_product_attention(*parts, is_causal=True)

        return self.join(attend(self.split(x)))


class Own(Heads):
    """Computes attention itself, and adds the noise that it is given."""

    attention_noise: LayerNoise | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        if self.attention_noise is not None:
            logits = self.attention_noise.on_logits(logits, training=self.training)
        weights = logits.softmax(-1)
        if self.attention_noise is not None:
            weights = self.attention_noise.on_weights(weights, training=self.training)
        return self.join(weights @ v)


class Torch(Heads):
    """`nn.MultiheadAttention` with the weights of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        # One module each: the same parameters under two names would hide the second.
        self.inner.in_proj_weight, self.inner.in_proj_bias = self.project.weight, self.project.bias
        self.inner.out_proj.weight, self.inner.out_proj.bias = self.back.weight, self.back.bias

    def forward(self, x: Tensor) -> Tensor:
        mask = ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class Unreachable(Heads):
    """Own attention without a way in."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join((q @ k.mT).softmax(-1) @ v)


class UnreachableAttention(Unreachable):
    pass


KINDS = pytest.mark.parametrize("kind", [Kernel, Own, Torch])
BOTH = pytest.mark.parametrize("where", ["logits", "weights"])


def model(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.ModuleDict({"attention": kind()}).train()


def moved(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max())


def x(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@contextmanager
def noised(root: nn.Module, std: float = 0.5, **options: Any) -> Iterator[Injection]:
    injection = Injection(std=std, seed=5, **options)
    remove = inject(root, injection)
    # The name is part of the key, and differs among the kinds.
    injection.layers[0].name = "attention"
    try:
        injection.begin(0)
        yield injection
    finally:
        remove()


@BOTH
def test_all_ways_give_the_same(where: str) -> None:
    found = []
    for kind in (Kernel, Own, Torch):
        root = model(kind)
        plain = root["attention"](x())
        with noised(root, where=where) as injection:
            found.append(root["attention"](x()))
            assert float(injection.perturbation()) > 0.05
        assert moved(found[-1], plain) > 1e-2
        assert torch.equal(root["attention"](x()), plain)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@KINDS
def test_the_perturbation_is_measured_alike(kind: type[nn.Module]) -> None:
    root = model(kind)
    with noised(root) as injection:
        root["attention"](x())
        found = float(injection.perturbation())
    reference = model(Own)
    with noised(reference) as injection:
        reference["attention"](x())
        assert found == pytest.approx(float(injection.perturbation()), rel=1e-4)


@KINDS
@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_meets_the_same_noise(
    kind: type[nn.Module], where: str, reentrant: bool
) -> None:
    root = model(kind)
    found = []
    for checkpointed in (False, True):
        root.zero_grad()
        with noised(root, where=where):
            begin = x().requires_grad_()
            layer = root["attention"]
            if checkpointed:
                output = checkpoint(layer, begin, use_reentrant=reentrant)
            else:
                output = layer(begin)
            output.square().sum().backward()
        found.append([begin.grad, *(p.grad.clone() for p in root.parameters())])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


@KINDS
@BOTH
def test_per_example_gradients_with_noise_are_those_of_each_row(
    kind: type[nn.Module], where: str
) -> None:
    """The engine sees what autograd would, row by row, under one realisation of the noise."""
    root = model(kind)
    with noised(root, where=where) as injection:

        def loss(part: nn.Module, rows: Tensor) -> Tensor:
            injection.begin(0)
            return part["attention"](rows).square().sum((1, 2)).mean()

        found = per_example_gradients(root, loss, x())
        for row in range(ROWS):
            injection.begin(0)
            output = root["attention"](x())
            own = torch.autograd.grad(output[row].square().sum(), list(root.parameters()))
            for (name, _), gradient in zip(root.named_parameters(), own, strict=True):
                torch.testing.assert_close(found[name][row], gradient, rtol=1e-4, atol=1e-5)


@KINDS
@BOTH
def test_a_module_in_evaluation_is_left_alone(kind: type[nn.Module], where: str) -> None:
    root = model(kind).eval()
    with torch.no_grad():
        plain = root["attention"](x())
        with noised(root, where=where):
            torch.testing.assert_close(root["attention"](x()), plain)
        with noised(root, where=where, at_inference=True):
            assert moved(root["attention"](x()), plain) > 1e-2


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights_wanted", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@BOTH
def test_torchs_module_in_all_its_ways(
    batch_first: bool, weights_wanted: bool, padding: str, where: str
) -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, kdim=WIDTH, vdim=WIDTH)
    padded = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    if padding != "none":
        padded[1, slice(0, 3) if padding == "left" else slice(-3, None)] = True
    begin = x() if batch_first else x().transpose(0, 1)
    options = {
        "key_padding_mask": None if padding == "none" else padded,
        "need_weights": weights_wanted,
    }
    plain = layer(begin, begin, begin, **options)[0]
    with noised(layer, 1e-9, where=where):
        torch.testing.assert_close(layer(begin, begin, begin, **options)[0], plain)
    other = begin.clone()
    (other if batch_first else other.transpose(0, 1))[padded] += 1
    with noised(layer, where=where) as injection:
        first = layer(begin, begin, begin, **options)[0]
        injection.begin(0)
        second = layer(begin, other, other, **options)[0]
    if padding != "none":
        torch.testing.assert_close(first, second)
    assert moved(first, plain) > 1e-2


def test_torchs_module_for_one_example_and_across() -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    one, memory = x(1)[0], torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    for where in ("logits", "weights"):
        with noised(layer, where=where):
            assert layer(one, memory, memory)[0].shape == one.shape


@pytest.mark.parametrize("mask", ["bool", "number", "causal", "none"])
@pytest.mark.parametrize("shape", [(2, 5), (5,), (2, 3, 5)])
@BOTH
def test_the_kernel_with_any_mask_and_number_of_dimensions(
    mask: str, shape: tuple[int, ...], where: str
) -> None:
    lead = (*shape, LENGTH)

    class User(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*lead, 4, generator=generator) for _ in range(3))
    allowed = torch.rand(LENGTH, LENGTH, generator=generator) < 0.6
    allowed.fill_diagonal_(True)
    options: dict[str, Any] = {
        "bool": {"attn_mask": allowed},
        "number": {"attn_mask": torch.zeros(LENGTH, LENGTH).masked_fill(~allowed, -torch.inf)},
        "causal": {"is_causal": True},
        "none": {},
    }[mask]
    user = User()
    plain = user(q, k, v, **options)
    with noised(user, 1e-9, where=where):
        torch.testing.assert_close(user(q, k, v, **options), plain)
    with noised(user, where=where):
        noisy = user(q, k, v, **options)
    assert noisy.shape == plain.shape
    assert moved(noisy, plain) > 1e-2


def test_an_encoder_layer_of_torch_trains_and_validates() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train()
    padded = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padded[0, -2:] = True
    plain = encoder(x(), src_key_padding_mask=padded)
    with noised(encoder):
        noisy = encoder(x(), src_key_padding_mask=padded)
        encoder.eval()
        with torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):
            shown = encoder(x(), src_key_padding_mask=padded)
    real = ~padded
    width = shown.shape[1]
    torch.testing.assert_close(shown[real[:, :width]], plain[real], atol=1e-5, rtol=1e-4)
    assert moved(noisy[real], plain[real]) > 1e-2


def test_a_fast_path_cannot_pass_the_noise_by() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        plain = layer(x())
        with noised(layer, at_inference=True):
            assert moved(layer(x()), plain) > 1e-2
        assert torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(layer(x()), plain)


def test_a_copy_of_a_noised_module_is_a_module_of_its_own() -> None:
    root = model(Kernel)
    plain = root["attention"](x())
    with noised(root):
        twin = copy.deepcopy(root)
        for parameter in root.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(twin["attention"](x()), plain)


@KINDS
def test_the_module_is_restored(kind: type[nn.Module]) -> None:
    root = model(kind)
    layer = root["attention"]
    before = {name: dict(vars(part)) for name, part in root.named_modules()}
    with pytest.raises(KeyboardInterrupt), noised(root):
        assert {name: dict(vars(part)) for name, part in root.named_modules()} != before
        raise KeyboardInterrupt
    assert find(root)
    after = {name: dict(vars(part)) for name, part in root.named_modules()}
    if kind is Own:
        assert after["attention"].pop("attention_noise") is None
    assert after == before
    assert type(layer).forward is layer.forward.__func__


def test_a_forward_that_somebody_else_replaced_is_given_back() -> None:
    root = model(Kernel)
    layer = root["attention"]
    calls = []
    original = layer.forward
    replaced = lambda x: (calls.append(1), original(x))[1]  # noqa: E731
    layer.forward = replaced
    with noised(root):
        layer(x())
    assert calls == [1]
    assert vars(layer)["forward"] is replaced


def test_attention_that_noise_cannot_reach_is_refused() -> None:
    root = nn.ModuleDict({"a": Kernel(), "b": UnreachableAttention()})
    with pytest.raises(ConfigurationError, match=r"b \(UnreachableAttention\)"):
        inject(root, Injection())
    inject(root, Injection(), ["a"])()
    with pytest.raises(ConfigurationError, match="b "):
        inject(root, Injection(), ["b"])
    with pytest.raises(ConfigurationError, match="reachable are: none"):
        inject(nn.Linear(2, 2), Injection())


def test_the_engines_checks_see_no_noise() -> None:
    from lightning_privacy.clipping.randomness import is_still, without_randomness

    root = model(Kernel)
    rows = x()
    plain = root["attention"](rows)
    with noised(root, quiet=is_still) as injection:
        with without_randomness():
            torch.testing.assert_close(root["attention"](rows), plain)
        assert not injection.layers[0].reached
        assert moved(root["attention"](x()), plain) > 1e-2
    assert not is_still()
