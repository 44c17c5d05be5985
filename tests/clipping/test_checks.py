"""The independence check: what couples examples is refused, by name and with the remedy."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.checks import IndependenceReport, check_independence, learn
from lightning_privacy.clipping.row_gradients import scaled_by
from lightning_privacy.errors import GuaranteeError, PrivacyError, UnsupportedOperationError
from tests.clipping.reference import Sketch, assert_untouched, numbers, tokens, trainable

ROWS = [0, 1, 2, 3]
LENGTHS = [3, 6, 2, 5, 4]
X = numbers(5, 6)
Y = tokens(5, below=3)
SEQUENCES = numbers(5, 6, 4)
IMAGES = numbers(5, 2, 3, 3)

Loss = Callable[[Any, list[int]], Tensor]


def checked(
    model: nn.Module, loss: Loss, rows: Sequence[int] = ROWS, **options: Any
) -> IndependenceReport:
    """Learn the layouts from one row and check ``rows``, as a fit does."""
    parameters = trainable(model)

    def loss_of(chosen: Sequence[int]) -> Tensor:
        return loss(model, list(chosen))

    layouts = learn(model, parameters, loss_of, rows[0])
    return check_independence(model, parameters, loss_of, rows, layouts=layouts, **options)


def padded(rows: list[int]) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths, and which steps are real."""
    longest = max(LENGTHS[row] for row in rows)
    real = torch.arange(longest)[None] < torch.tensor([LENGTHS[row] for row in rows])[:, None]
    return SEQUENCES[rows, :longest] * real[:, :, None], real


def classify(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(X[rows]), Y[rows])


def by_example(m: Any, rows: list[int]) -> Tensor:
    x, real = padded(rows)
    each = (m(x).square().mean(2) * real).sum(1) / real.sum(1)
    return each.mean()


# ---------------------------------------------------------------------- refused
def token_mean(m: Any, rows: list[int]) -> Tensor:
    x, real = padded(rows)
    return m(x).square().mean(2)[real].mean()


def padded_length(m: Any, rows: list[int]) -> Tensor:
    x, real = padded(rows)
    return (m(x).square().mean(2) * real).sum(1).mean() / x.shape[1]


def summed(m: Any, rows: list[int]) -> Tensor:
    return F.cross_entropy(m(X[rows]), Y[rows], reduction="sum")


def contrastive(m: Any, rows: list[int]) -> Tensor:
    left, right = m(X[rows]), m(X[rows] + 0.1)
    return F.cross_entropy(left @ right.t(), torch.arange(len(rows)))


def neighbours(m: Any, rows: list[int]) -> Tensor:
    hidden = m(X[rows])
    return (hidden + 0.3 * hidden.roll(1, 0)).square().mean()


def mixed_up(m: Any, rows: list[int]) -> Tensor:
    x = X[rows]
    x = 0.7 * x + 0.3 * x[torch.randperm(len(rows))]
    return F.cross_entropy(m(x), Y[rows])


def time_first(m: Any, rows: list[int]) -> Tensor:
    flat = SEQUENCES[rows].transpose(0, 1).flatten(0, 1)
    return m(flat).unflatten(0, (6, -1)).square().mean((0, 2)).mean()


def by_loop(m: Any, rows: list[int]) -> Tensor:
    return torch.stack([m(X[row]).square().mean() for row in rows]).mean()


def led_by_the_first(m: Any, rows: list[int]) -> Tensor:
    hidden = m(X[rows])
    return (hidden + 0.05 * hidden[:1].detach()).square().mean()


def batch_mean_removed(m: Any, rows: list[int]) -> Tensor:
    hidden = m(X[rows])
    return (hidden - hidden.mean(0).detach()).square().mean()


COUPLED: dict[str, tuple[Callable[[], nn.Module], Loss, str, str]] = {
    "token mean": (
        lambda: nn.Linear(4, 3),
        token_mean,
        "all gradients are scaled by",
        "mean over all tokens",
    ),
    "padded length": (
        lambda: nn.Linear(4, 3),
        padded_length,
        "scaled by",
        "each example's own loss",
    ),
    "sum declared mean": (lambda: nn.Linear(6, 3), summed, "scaled by 4", "declare loss_reduction"),
    "contrastive": (lambda: nn.Linear(6, 3), contrastive, "differs", "one example at a time"),
    "neighbours": (lambda: nn.Linear(6, 3), neighbours, "differs", "one example at a time"),
    "mixed up": (lambda: nn.Linear(6, 3), mixed_up, "differs", "one example at a time"),
    "time first": (lambda: nn.Linear(4, 3), time_first, "differs", "first dimension"),
    "loop": (lambda: nn.Linear(6, 3), by_loop, "differs", "first dimension"),
    "led by the first": (lambda: nn.Linear(6, 3), led_by_the_first, "differs", ""),
    "batch mean": (lambda: nn.Linear(6, 3), batch_mean_removed, "differs", "one example at a time"),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses(name: str, dtype: str) -> None:
    make, loss, found, remedy = COUPLED[name]
    torch.manual_seed(0)
    model = make()
    if dtype == "float64":
        model = model.double()
    with pytest.raises(GuaranteeError) as caught, torch.no_grad():
        checked(model, lambda m, rows: _in(dtype, loss, m, rows))
    assert found in caught.value.found
    assert caught.value.found.startswith(("weight", "bias"))
    assert remedy in caught.value.remedy
    assert_untouched(model)


def test_spectral_normalisation_is_named_and_not_called_a_scale() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))
    with pytest.raises(GuaranteeError, match="spectral normalisation moves its vectors") as caught:
        checked(model, classify)
    assert "scaled" not in caught.value.found
    assert "weight normalisation" in caught.value.remedy


def test_a_turn_is_no_scale() -> None:
    own = {"weight": torch.tensor([1.0, 0.0])}
    assert scaled_by(own, {"weight": torch.tensor([0.5, 0.0])}) == 2
    assert scaled_by(own, {"weight": torch.tensor([1.0, 0.01])}) is None
    assert scaled_by(own, {"weight": torch.tensor([0.0, 1.0])}) is None


def _in(dtype: str, loss: Loss, m: Any, rows: list[int]) -> Tensor:
    if dtype == "float32":
        return loss(m, rows)
    return loss(lambda x: m(x.double()), rows)


@pytest.mark.parametrize("name", sorted(set(COUPLED) - {"mixed up"}))
def test_coupled_losses_in_bfloat16(name: str) -> None:
    make, loss, _, _ = COUPLED[name]
    torch.manual_seed(0)
    model = make().bfloat16()
    with pytest.raises(GuaranteeError):
        checked(model, lambda m, rows: loss(lambda x: m(x.bfloat16()), rows))


NORMALISED: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: nn.BatchNorm2d(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "frozen affine": lambda: nn.BatchNorm2d(4).requires_grad_(False),
    "without running statistics": lambda: nn.BatchNorm2d(
        4, affine=False, track_running_stats=False
    ),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_batch_normalisation(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2), NORMALISED[name](), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(PrivacyError) as caught:
        checked(model, lambda m, rows: F.cross_entropy(m(IMAGES[rows]), Y[rows]))
    assert "GroupNorm" in caught.value.remedy
    if name == "affine":
        assert isinstance(caught.value, UnsupportedOperationError)
        assert "1.weight" in caught.value.found
    else:
        assert caught.value.found.startswith("0.")
        assert "batch normalisation at 1" in caught.value.found


def test_batch_normalisation_that_cannot_take_one_row() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    with pytest.raises(GuaranteeError, match="a batch of one row") as caught:
        checked(model, classify)
    assert "GroupNorm" in caught.value.remedy


def test_routing_of_rows_to_experts_by_index() -> None:
    def forward(m: Sketch, x: Tensor) -> Tensor:
        chosen = m.router(x).argmax(-1)
        output = x.new_zeros(len(x), 3)
        for number, expert in enumerate(m.experts):
            picked = (chosen == number).nonzero()[:, 0]
            if len(picked):
                output = output.index_add(0, picked, expert(x[picked]))
        return output

    torch.manual_seed(3)
    model = Sketch(
        forward,
        router=nn.Linear(6, 2),
        experts=nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]),
    )
    assert 0 < int(model.router(X[ROWS]).argmax(-1).sum()) < 4
    with pytest.raises(PrivacyError, match="experts"):
        checked(model, classify)


def test_a_recurrent_layer_that_takes_rows_for_time() -> None:
    model = Sketch(lambda m, x: m.layer(x)[0], layer=nn.GRU(4, 3))  # batch_first was forgotten
    with pytest.raises(UnsupportedOperationError, match=r"layer\.weight_hh_l0") as caught:
        checked(model, lambda m, rows: m(SEQUENCES[rows]).square().mean())
    assert "batch_first=True" in caught.value.remedy


def test_a_penalty_beside_a_sum_depends_on_the_number_of_rows() -> None:
    def loss(m: Any, rows: list[int]) -> Tensor:
        return summed(m, rows) + m.weight.square().sum()

    with pytest.raises(GuaranteeError, match="weight"):
        checked(nn.Linear(6, 3), loss, loss_reduction="sum")


# ---------------------------------------------------------------------- passed
class Correct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.frozen = nn.BatchNorm1d(8).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.register_buffer("calls", torch.tensor(0))
        self.steps = 0.0

    def train(self, mode: bool = True) -> Correct:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.drop(self.norm(self.first(x).flatten(0, 1))).unflatten(0, x.shape[:2])
        hidden = self.frozen(hidden.flatten(0, 1)).unflatten(0, x.shape[:2])
        hidden = hidden + 0.1 * torch.randn_like(hidden) * (random.random() < 2)
        return self.last(checkpoint(torch.tanh, hidden, use_reentrant=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_correct_module_with_dropout_noise_and_masks_passes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Correct().to(dtype).train()
    report = checked(model, lambda m, rows: by_example(lambda x: m(x.to(dtype)).float(), rows))
    assert report.rows == len(ROWS)
    assert report.worst <= {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.1}[dtype]
    assert report.worst <= report.tolerance
    assert report.parameter in dict(model.named_parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_declared_reduction_passes(reduction: str) -> None:
    loss = classify if reduction == "mean" else summed
    report = checked(nn.Linear(6, 3), loss, loss_reduction=reduction)
    assert report.worst < 1e-5


def test_a_penalty_beside_a_mean_passes() -> None:
    model = nn.Linear(6, 3)
    report = checked(model, lambda m, rows: classify(m, rows) + m.weight.square().sum())
    assert report.worst < 1e-5


def test_a_recurrent_layer_passes() -> None:
    model = Sketch(
        lambda m, x: m.layer(x)[0], layer=nn.LSTM(4, 3, 2, dropout=0.3, batch_first=True)
    )
    report = checked(model, by_example)
    assert report.worst < 1e-4


def test_a_loss_without_gradient_is_not_compared() -> None:
    report = checked(nn.Linear(6, 3), lambda m, rows: torch.tensor(1.0))
    assert report.rows == 0


def test_identical_rows_and_two_rows() -> None:
    assert checked(nn.Linear(6, 3), classify, rows=[1, 1]).worst < 1e-5
    with pytest.raises(GuaranteeError):
        checked(nn.Linear(6, 3), mixed_up, rows=[0, 1])


def test_a_zero_gradient_passes() -> None:
    report = checked(nn.Linear(6, 3), lambda m, rows: 0 * classify(m, rows))
    assert report.worst == 0.0


def test_rows_that_cancel_are_complete() -> None:
    """At an optimum rows add up to rounding, which is another than autograd's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)), torch.randn(1, 64)
    with torch.no_grad():
        target = model(x) + torch.tensor([[3.0], [-3.0], [3.0], [-3.0]])
    for rows in ([0, 1], [0, 1, 2, 3]):
        checked(model, lambda m, rows: F.mse_loss(m(x.repeat(len(rows), 1)), target[rows]), rows)


def test_differences_of_rows_that_are_learnt_already_are_compared_on_a_fixed_scale() -> None:
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.mul_(0)
        model.bias.copy_(torch.tensor([16.0, 0.0, 0.0]))

    def loss(m: Any, rows: list[int]) -> Tensor:
        return F.cross_entropy(m(X[rows]) * (1 + 0.01 * len(set(rows))), 0 * Y[rows])

    checked(model, loss, negligible=1e-3)
    with pytest.raises(GuaranteeError):
        checked(model, loss)


def test_small_residuals_may_round_and_nothing_else() -> None:
    """A row alone is computed by another kernel than a batch: residuals of 1e-5 differ by 1 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2048), nn.Linear(2048, 1))
    with torch.no_grad():
        target = torch.cat([model(row[None]) for row in X]) - 1e-5
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss(m: Any, rows: list[int]) -> Tensor:
        return F.mse_loss(m(X[rows]), target[rows])

    checked(model, loss)
    assert all(map(torch.equal, before, model.parameters()))
    for coupled in (
        lambda m, rows: loss(m, rows) * (1 + 0.1 * len(rows)),
        lambda m, rows: F.mse_loss(m(X[rows] + 0.01 * X[rows].mean(0)), target[rows]),
    ):
        with pytest.raises(GuaranteeError):
            checked(model, coupled)
    # What is rounding altogether may be anything, and is not taken for rounding.
    target += 1e-5
    with pytest.raises(GuaranteeError):
        checked(model, lambda m, rows: loss(m, rows) * len(rows))
    # Residuals that do not round badly: nothing is allowed for.
    target += 1
    with pytest.raises(GuaranteeError):
        checked(model, lambda m, rows: loss(m, rows) * (1 + 0.001 * len(rows)))


def test_a_gradient_that_is_not_a_number_is_a_difference() -> None:
    def loss(m: Any, rows: list[int]) -> Tensor:
        value = classify(m, rows)
        return value * float("nan") if len(rows) == 4 else value

    with pytest.raises(GuaranteeError, match="inf"):
        checked(nn.Linear(6, 3), loss)


# ---------------------------------------------------------------------- memory between batches
class Remembering(nn.Module):
    """Adds the mean of the last batch, kept in a plain attribute that no buffer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        seen = x if self.last is None else x + self.last
        self.last = x.detach().mean(0)
        return self.layer(seen)


def test_a_memory_of_earlier_batches_is_refused() -> None:
    with pytest.raises(GuaranteeError) as caught:
        checked(Remembering(), classify)
    assert "layer." in caught.value.found


# ---------------------------------------------------------------------- tensors outside
def test_a_trainable_tensor_behind_reentrant_checkpointing_is_refused() -> None:
    hidden = torch.zeros(6, 3, requires_grad=True)
    model = Sketch(lambda m, x: m.layer(x) + x @ hidden, layer=nn.Linear(6, 3))

    def loss(m: Any, rows: list[int]) -> Tensor:
        x = X[rows].clone().requires_grad_()
        return F.cross_entropy(checkpoint(m, x, use_reentrant=True), Y[rows])

    with pytest.raises(GuaranteeError, match=r"a tensor of shape \(6, 3\)"):
        checked(model, loss)


# ---------------------------------------------------------------------- nothing is left behind
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_gradients_and_random_states_are_restored(fails: bool) -> None:
    torch.manual_seed(0)
    model = Correct().train()
    gradient = torch.ones_like(model.last.bias)
    model.last.bias.grad = gradient
    states = torch.get_rng_state(), random.getstate()
    loss = token_mean if fails else by_example
    try:
        checked(model, loss)
    except GuaranteeError:
        assert fails
    else:
        assert not fails
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.calls == 0
    assert model.last.bias.grad is gradient
    assert gradient.tolist() == [1.0, 1.0, 1.0]
    assert model.training
    model.last.bias.grad = None
    assert_untouched(model)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_restored_when_the_forward_fails(kind: type[BaseException]) -> None:
    model = nn.Linear(6, 3)
    calls = 0

    def loss(m: Any, rows: list[int]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise kind
        return classify(m, rows)

    with pytest.raises((kind, GuaranteeError)):
        checked(model, loss)
    assert calls == 6
    assert_untouched(model)


# ---------------------------------------------------------------------- completeness
def test_what_the_capture_never_sees_is_refused() -> None:
    # The rows agree, alone and in a batch; only autograd's own gradient of the batch has more.
    def loss(m: Any, rows: list[int]) -> Tensor:
        value = classify(m, rows)
        unseen = type(m.weight) is nn.Parameter and len(rows) > 1
        return value + m.weight.square().sum() if unseen else value

    with pytest.raises(GuaranteeError, match=r"add up to autograd's own"):
        checked(nn.Linear(6, 3), loss)


def test_a_gradient_that_is_captured_only_in_part_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Wrong in the batch and equally wrong alone: only the sum shows it.
    original = Capture._add_dense

    def half(self: Capture, slot: Any, gradients: Tensor) -> None:
        original(self, slot, gradients * 0.5)

    monkeypatch.setattr(Capture, "_add_dense", half)
    with pytest.raises(GuaranteeError, match=r"weight|bias"):
        checked(nn.Linear(6, 3), classify)
