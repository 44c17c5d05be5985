"""The check on two rows: what eight rows at the start may not show, and nothing that is right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_privacy.clipping.checks import learn
from lightning_privacy.clipping.pairs import PairCheck
from lightning_privacy.clipping.randomness import Draws
from lightning_privacy.errors import GuaranteeError
from tests.clipping.reference import Sketch, assert_untouched, numbers, trainable

X = numbers(4, 6)
Y = torch.tensor([0, 1, 0, 2])
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
SEQUENCES = numbers(4, 5, 6)
LABELS = torch.tensor([[0, 1, 2, 1, 0], [1, 1, 0, 2, 2], [0, -100, 2, 1, 0], [2, 2, 1, 0, 1]])

Loss = Callable[[Any, list[int]], Tensor]


def pair_check(model: nn.Module, loss: Loss, **options: Any) -> PairCheck:
    parameters = trainable(model)

    def loss_of(rows: Sequence[int]) -> Tensor:
        return loss(model, list(rows))

    layouts = learn(model, parameters, loss_of, 0)
    return PairCheck(
        module=model, parameters=parameters, loss_of=loss_of, layouts=layouts, **options
    )


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


# ---------------------------------------------------------------------- means over labels
def weighted(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(X[rows]), Y[rows], weight=WEIGHTS)


def weighted_module(m: Any, rows: list[int]) -> Tensor:
    return nn.NLLLoss(weight=WEIGHTS)(m(X[rows]).log_softmax(-1), Y[rows])


@pytest.mark.parametrize("loss", [weighted, weighted_module])
def test_class_weights_are_refused_though_the_rows_share_a_class(loss: Loss) -> None:
    with pytest.raises(GuaranteeError, match="weight=") as caught:
        pair_check(linear(), loss).run([0, 2])
    assert 'reduction="none"' in caught.value.remedy
    with pytest.raises(GuaranteeError, match="all gradients are scaled"):
        pair_check(linear(), loss).run([0, 1])


def by_example(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(X[rows]), Y[rows], weight=WEIGHTS, reduction="none").mean()


def equal_weights(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(X[rows]), Y[rows], weight=torch.full((3,), 0.5))


def in_a_loop(m: Any, rows: list[int]) -> Tensor:
    scores = m(SEQUENCES[rows])
    losses = [F.cross_entropy(own, LABELS[r], weight=WEIGHTS) for own, r in zip(scores, rows)]  # noqa: B905
    return sum(losses) / len(rows)  # type: ignore[return-value]


def soft_labels(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(X[rows]), F.one_hot(Y[rows], 3).float(), weight=WEIGHTS)


def weighted_for_the_log(m: Any, rows: list[int]) -> Tensor:
    weighted(m, rows)
    F.cross_entropy(m(SEQUENCES[rows]).flatten(0, 1), LABELS[rows].flatten())
    return F.cross_entropy(m(X[rows]), Y[rows])


@pytest.mark.parametrize(
    "loss", [by_example, equal_weights, soft_labels, in_a_loop, weighted_for_the_log]
)
def test_class_weights_that_couple_nothing_pass(loss: Loss) -> None:
    check = pair_check(linear(), loss)
    check.run([0, 1])
    check.run([0, 2])


def token_mean(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(SEQUENCES[rows]).flatten(0, 1), LABELS[rows].flatten())


def test_a_token_mean_passes_while_rows_are_equal_and_is_watched_from_then_on() -> None:
    model = linear()
    check = pair_check(model, token_mean)
    check.run([0, 1])
    assert check.labels.active
    for rows in ([0, 1, 3], [2], [0, 1, 2]):
        with check.labels.watching(len(rows)):
            loss = token_mean(model, rows)
        loss.backward()
        if len(rows) == 1 or 2 not in rows:
            check.labels.verify()
            continue
        with pytest.raises(GuaranteeError, match="1 of the 15 labels of 3 rows ignored, where 0"):
            check.labels.verify()
    check.labels.verify()


def test_rows_that_all_ignore_as_many_labels_pass() -> None:
    model = linear()

    def shifted(m: Any, rows: list[int]) -> Tensor:
        labels = F.pad(LABELS[rows][:, 1:], (0, 1), value=-100)
        return F.cross_entropy(m(SEQUENCES[rows]).flatten(0, 1), labels.flatten())

    check = pair_check(model, shifted)
    check.run([0, 1])
    with check.labels.watching(3):
        loss = shifted(model, [0, 1, 3])
    loss.backward()
    check.labels.verify()


def test_nothing_is_watched_without_need() -> None:
    check = pair_check(linear(), by_example)
    check.run([0, 1])
    assert not check.labels.active
    check = pair_check(linear(), weighted_for_the_log)
    check.run([0, 1])
    with check.labels.watching(3):
        loss = weighted_for_the_log(check.module, [0, 1, 2])
    loss.backward()
    check.labels.verify()


# ---------------------------------------------------------------------- coins
def mixing(m: Any, rows: list[int]) -> Tensor:
    x = X[rows]
    return F.cross_entropy(m(0.7 * x + 0.3 * x.roll(1, 0)), Y[rows])


COINS: dict[str, Callable[[], bool]] = {
    "torch": lambda: bool(torch.rand(()) < 0.3),
    "torch, else": lambda: bool(torch.rand(1) > 0.9),
    "bernoulli": lambda: not torch.bernoulli(torch.tensor(0.5)),
    "normal": lambda: bool(torch.randn(()) > 0.5),
    "integer": lambda: bool(torch.randint(2, ())),
    "uniform": lambda: bool(torch.empty(()).uniform_(-1, 1) > 0.5),
    "python": lambda: random.random() < 0.3,
    "numpy": lambda: np.random.rand() > 0.7,  # noqa: NPY002
}


@pytest.mark.parametrize("coin", COINS)
def test_mixing_that_a_coin_decides_is_found(coin: str) -> None:
    def loss(m: Any, rows: list[int]) -> Tensor:
        return mixing(m, rows) if COINS[coin]() else F.cross_entropy(m(X[rows]), Y[rows])

    check = pair_check(linear(), loss)
    check.run([0, 1])
    with pytest.raises(GuaranteeError, match="a row's gradient"):
        for draws in (Draws.LOW, Draws.HIGH):
            check.run([0, 1], draws)


@pytest.mark.parametrize("draws", list(Draws))
def test_chance_that_mixes_nothing_passes(draws: Draws) -> None:
    def loss(m: Any, rows: list[int]) -> Tensor:
        x = torch.stack([X[r] * random.uniform(0.8, 1.2) + np.random.normal() for r in rows])  # noqa: NPY002
        x = F.dropout(x + torch.randn_like(x), 0.2) * np.random.beta(0.4, 0.4)  # noqa: NPY002
        keep = torch.empty(len(rows), 1).bernoulli_(0.9)
        return F.cross_entropy(m(x * keep), Y[rows])

    model = linear()
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate()
    pair_check(model, loss).run([0, 1], draws)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# ---------------------------------------------------------------------- rounding
@pytest.mark.parametrize("place", [0, 1])
def test_rounding_at_either_place_of_a_pair_passes(place: int) -> None:
    """A kernel may sum the second of two rows in another order: of small residuals it shows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2048), nn.Linear(2048, 1)), numbers(4, 3)
    with torch.no_grad():
        target = torch.cat([model(row[None]) for row in x]) - 1e-5
    check = pair_check(model, lambda m, rows: F.mse_loss(m(x[rows]), target[rows]))
    for pair in itertools.permutations(range(len(x)), 2):
        check.run(pair, Draws.MIDDLE, place)


# ---------------------------------------------------------------------- tensors outside
class Hiding(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer = linear()
        hidden = torch.zeros(3, requires_grad=True)
        self.held: Any = {
            "attribute": hidden,
            "list": [hidden],
            "dictionary": {"bias": hidden},
            "module": [nn.Linear(6, 3)],
        }[where]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.held, Tensor):
            return self.layer(x) + self.held
        held = self.held["bias"] if isinstance(self.held, dict) else self.held[0]
        return self.layer(x) + (held(x) if isinstance(held, nn.Module) else held)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("attribute", "held of shape (3,)"),
        ("list", "held[0] of shape (3,)"),
        ("dictionary", "held['bias'] of shape (3,)"),
        ("module", "held[0].weight of shape (3, 6)"),
    ],
)
@pytest.mark.parametrize("reentrant", [None, False])
def test_a_trainable_tensor_outside_is_refused_by_name(
    where: str, name: str, reentrant: bool | None
) -> None:
    def loss(m: Any, rows: list[int]) -> Tensor:
        x = X[rows].clone().requires_grad_()
        out = m(x) if reentrant is None else checkpoint(m, x, use_reentrant=reentrant)
        return F.cross_entropy(out, Y[rows])

    model = Hiding(where)
    with pytest.raises(GuaranteeError) as caught:
        pair_check(model, loss).run([0, 1])
    assert name in caught.value.found
    assert "nn.Parameter" in caught.value.remedy
    assert_untouched(model)


def test_a_tensor_that_no_attribute_holds_is_refused_by_shape() -> None:
    hidden = torch.zeros(3, requires_grad=True)
    with pytest.raises(GuaranteeError, match=r"a tensor of shape \(3,\)"):
        pair_check(linear(), lambda m, rows: F.cross_entropy(m(X[rows]) + hidden, Y[rows])).run(
            [0, 1]
        )


def test_inputs_and_activations_that_require_gradients_pass() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        return m.last(checkpoint(m.first(x).requires_grad_().tanh, use_reentrant=False))

    model = Sketch(forward, first=nn.Linear(6, 6).requires_grad_(False), last=linear())

    def loss(m: Any, rows: list[int]) -> Tensor:
        return F.cross_entropy(m(X[rows].clone().requires_grad_()), Y[rows])

    pair_check(model, loss).run([0, 1])


# ---------------------------------------------------------------------- while training
def test_memory_between_batches_is_refused() -> None:
    kept: list[Tensor] = []

    def loss(m: Any, rows: list[int]) -> Tensor:
        x = X[rows] + (kept[-1] if kept else 0)
        kept.append(X[rows].mean(0))
        return F.cross_entropy(m(x), Y[rows])

    with pytest.raises(GuaranteeError, match="leaves nothing behind"):
        pair_check(linear(), loss).run([0, 1])


def test_differences_of_rows_that_are_learnt_already_are_compared_on_a_fixed_scale() -> None:
    model = linear()
    with torch.no_grad():
        model.weight.mul_(0)
        model.bias.copy_(torch.tensor([16.0, 0.0, 0.0]))

    def loss(m: Any, rows: list[int]) -> Tensor:
        return F.cross_entropy(m(X[rows]) * (1 + 0.01 * len(set(rows))), 0 * Y[rows])

    pair_check(model, loss, negligible=1e-3).run([0, 1])
    with pytest.raises(GuaranteeError):
        pair_check(model, loss).run([0, 1])


def test_rounding_that_a_row_shows_beside_its_copy_is_no_coupling() -> None:
    def rounded(m: Any, rows: list[int]) -> Tensor:
        return F.cross_entropy(m(X[rows]), Y[rows]) * (1 + 0.003 * len(rows))

    def led(m: Any, rows: list[int]) -> Tensor:
        return rounded(lambda x: m(x) + m(x[:1]).detach(), rows)

    pair_check(linear(), rounded).run([0, 1])
    with pytest.raises(GuaranteeError):
        pair_check(linear(), lambda m, rows: rounded(m, rows) * len(rows)).run([0, 1])
    with pytest.raises(GuaranteeError):
        pair_check(linear(), led).run([0, 1], place=1)


def test_no_raw_gradient_reaches_a_parameter() -> None:
    model = linear()

    def refuse(_: Tensor) -> None:
        raise AssertionError

    handles = [p.register_hook(refuse) for p in model.parameters()]
    pair_check(model, by_example).run([0, 1])
    for handle in handles:
        handle.remove()
    assert_untouched(model)


def test_a_loss_without_gradient_is_not_compared() -> None:
    pair_check(linear(), lambda m, rows: torch.tensor(1.0)).run([0, 1])
