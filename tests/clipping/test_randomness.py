"""A forward without chance, which leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.clipping.randomness import preserved_state, without_randomness

X = torch.ones(4, 3)
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "dropout by channel": lambda x: F.dropout1d(x[:, :, None].expand(-1, -1, 4), 0.5),
    "dropout of images": lambda x: F.dropout2d(x[:, :, None, None].expand(-1, -1, 2, 2), 0.5),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "attention dropout": lambda x: F.scaled_dot_product_attention(
        *[x[:, None].expand(-1, 5, -1)] * 3, dropout_p=0.5
    ),
    "randomized relu": lambda x: F.rrelu(-x, training=True),
    "gumbel softmax": lambda x: F.gumbel_softmax(x),
    "rand": lambda x: torch.rand(len(x), 2),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(len(x), 2),
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(3, 9, (len(x),)),
    "randint_like": lambda x: torch.randint_like(x, 5),
    "normal": lambda x: torch.normal(0.0, 1.0, (len(x),)),
    "normal_": lambda x: x.clone().normal_(),
    "uniform_": lambda x: x.clone().uniform_(),
    "bernoulli": lambda x: torch.bernoulli(x * 0.5),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5),
    "exponential_": lambda x: x.clone().exponential_(),
    "geometric_": lambda x: x.clone().geometric_(0.3),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "random_": lambda x: x.clone().random_(),
    "multinomial": lambda x: torch.multinomial(x, 1),
    "poisson": lambda x: torch.poisson(4 * x),
    "binomial": lambda x: torch.binomial(3 * x, 0.5 * x),
    "beta": lambda x: torch.distributions.Beta(x, x).sample(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_row_draws_the_same_alone_and_in_a_batch(name: str) -> None:
    with without_randomness():
        together, again = DRAWS[name](X), DRAWS[name](X)
        alone = DRAWS[name](X[:1])
    torch.testing.assert_close(together, again, rtol=0, atol=0)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=0)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    assert torch.isfinite(together.double()).all()


@pytest.mark.parametrize("name", sorted(set(DRAWS) - {"gumbel softmax"}))
def test_the_draws_are_random_outside(name: str) -> None:
    torch.manual_seed(0)
    x = X.repeat(25, 3)
    assert not torch.equal(DRAWS[name](x), DRAWS[name](x))


def test_a_permutation_is_never_the_identity() -> None:
    with without_randomness():
        for size in (2, 3, 10):
            order = torch.randperm(size)
            assert sorted(order.tolist()) == list(range(size))
            assert (order != torch.arange(size)).all()
        assert torch.randperm(1).tolist() == [0]


def test_values_fit_their_arguments() -> None:
    with without_randomness():
        assert torch.randint(3, 9, (5,)).tolist() == [3] * 5
        assert torch.multinomial(torch.tensor([[0.1, 0.7, 0.2]]), 1).tolist() == [[1]]


def test_dropout_keeps_everything_and_gradients_flow() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    with without_randomness():
        F.dropout(x, 0.5).sum().backward()
    assert x.grad is not None
    assert (x.grad == x.grad[0, 0]).all()
    assert x.grad[0, 0] > 0


# ---------------------------------------------------------------------- no trace
class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("constant", torch.zeros(1).expand(3))
        self.register_buffer("missing", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("reassigned", torch.zeros(2))
        self.register_buffer("transient", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.reassigned = self.reassigned + 1
        self.transient += 1
        self.missing[0] = 3.0
        return self.norm(x)


def test_buffers_gradients_and_random_states_are_restored() -> None:
    module = Counting()
    module.norm.weight.grad = torch.ones(3)
    before = {name: (id(b), b.clone()) for name, b in module.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with preserved_state(module):
        module(torch.randn(4, 3)).square().sum().backward()
        random.random()
        np.random.rand()  # noqa: NPY002
        assert module.norm.num_batches_tracked == 1
    for name, buffer in module.named_buffers():
        identity, value = before[name]
        assert id(buffer) == identity, name
        torch.testing.assert_close(buffer, value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(module.norm.weight.grad, torch.ones(3))
    assert module.norm.bias.grad is None
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]


def test_restored_after_an_interrupt() -> None:
    module = Counting()
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), preserved_state(module):
        module(torch.randn(4, 3))
        raise KeyboardInterrupt
    assert module.norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)
