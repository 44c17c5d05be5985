"""Large layers under checkpointing are clipped in two backwards, exactly as in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.clipping import revisit
from lightning_privacy.clipping.contributions import Outer
from lightning_privacy.errors import GuaranteeError
from tests.clipping.reference import (
    Gradients,
    clipped_by_hand,
    loop_gradients,
    norm,
    numbers,
    plan_of,
    squares,
    step_of,
)

ROOM = revisit.room
ROWS, TOKENS, WIDTH, BLOCKS = 5, 3, 6, 4
# Three matrices, with the free memory that each byte of factors is to have.
ROOM_FOR_A_BLOCK = 1.5 * 3 * 8 * ROWS * TOKENS * (WIDTH + 8)
BATCH = numbers(ROWS, TOKENS, WIDTH).double()


class Block(nn.Module):
    """Two layers that read the same input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False)
        self.down, self.norm = nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(x)
        return x + self.dropout(self.down(self.up(x) * self.gate(x).sigmoid()))


class Stack(nn.Module):
    """Blocks that are computed again in the backward, or are not."""

    def __init__(self, reentrant: bool | None = False, *, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        blocks = [Block() for _ in range(BLOCKS)]
        self.blocks = nn.ModuleList([blocks[0], *blocks[1:-1], blocks[1 if shared else -1]])
        self.head = nn.Linear(WIDTH, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisit, "LARGEST", 0)
    monkeypatch.setattr(revisit, "room", lambda device: 2 * ROOM_FOR_A_BLOCK)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what a second backward has brought."""
    names: list[str] = []
    leave = revisit.Revisit.leave

    def noted(self: revisit.Revisit, name: str, outer: Outer) -> bool:
        left = leave(self, name, outer)
        if left and self.revisiting:
            names.append(name)
        return left

    monkeypatch.setattr(revisit.Revisit, "leave", noted)
    return names


def released(
    module: nn.Module,
    batch: Tensor = BATCH,
    *,
    twice: bool,
    weights: tuple[float, ...] = (1.0,) * ROWS,
    loss_fn: Callable[..., Tensor] = squares,
    seed: int = 7,
    **changes: Any,
) -> Gradients:
    step = step_of(module, **changes)
    torch.manual_seed(seed)  # of dropout
    try:
        step.begin(weights)
        loss = loss_fn(module, batch)
        again = step.arm(twice=twice)
        loss.backward(retain_graph=again)
        step.end(loss if again else None)
        step.release(0)
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    finally:
        step.close()


def assert_close(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14)


LATE = [f"blocks.{block}.{layer}.weight" for block in (3, 2) for layer in ("down", "gate", "up")]


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1e4])
def test_two_backwards_equal_one(kept: list[str], clip_norm: float) -> None:
    model = Stack().double()
    one = released(model, twice=False, clip_norm=clip_norm)
    assert not kept
    before = [block.calls for block in model.blocks]
    two = released(model, twice=True, clip_norm=clip_norm)
    assert_close(two, one)
    assert sorted(kept) == sorted(LATE)
    # Once in the forward, once in each backward that comes by: the second goes half the way.
    calls = [block.calls - old for block, old in zip(model.blocks, before, strict=True)]
    assert calls == [2, 2, 3, 3]


def test_two_backwards_equal_clipping_by_hand(kept: list[str]) -> None:
    model = Stack().double().eval()
    by_hand = clipped_by_hand(loop_gradients(model, squares, BATCH), 0.1)
    assert_close(released(model, twice=True, clip_norm=0.1), by_hand)
    assert kept


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_unit_that_is_not_finite_adds_exactly_nothing(kept: list[str], poison: float) -> None:
    model = Stack().double()
    weights = (1.0, 1.0, 0.0, 1.0, 1.0)
    whole = released(model, twice=True, weights=weights)
    poisoned = BATCH.clone()
    poisoned[2, 1] = poison
    found = released(model, poisoned, twice=True)
    assert len(kept) == 2 * len(LATE)
    assert all(torch.equal(found[name], gradient) for name, gradient in whole.items())


def test_what_is_used_twice_keeps_its_factors(
    kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisit, "room", lambda device: ROOM_FOR_A_BLOCK)
    model = Stack(shared=True).double()
    one = released(model, twice=False, clip_norm=0.1)
    assert_close(released(model, twice=True, clip_norm=0.1), one)
    assert set(kept) == {name for name in LATE if "blocks.2" in name}


@pytest.mark.parametrize("changes", [{"clipping": "per_layer"}, {"clipping": "automatic"}])
def test_other_ways_to_clip(kept: list[str], changes: dict[str, Any]) -> None:
    model = Stack().double()
    one = released(model, twice=False, **changes)
    assert_close(released(model, twice=True, **changes), one)
    assert bool(kept) == (changes["clipping"] == "automatic")


@pytest.mark.parametrize("reentrant", [None, True])
def test_where_nothing_is_computed_again_by_every_backward_there_is_one(
    kept: list[str], reentrant: bool | None
) -> None:
    model = Stack(reentrant).double()
    expected = released(Stack().double(), twice=False)
    assert_close(released(model, twice=True), expected)
    assert not kept


@pytest.mark.parametrize(("room", "number"), [(0.0, 12), (float("inf"), 0)])
def test_so_much_is_left_as_has_no_room(
    kept: list[str], monkeypatch: pytest.MonkeyPatch, room: float, number: int
) -> None:
    monkeypatch.setattr(revisit, "room", lambda device: room)
    model = Stack().double()
    one = released(model, twice=False, clip_norm=0.1)
    assert_close(released(model, twice=True, clip_norm=0.1), one)
    assert len(kept) == number


def test_nobody_counts_the_memory_of_the_processor() -> None:
    assert ROOM(torch.device("cpu")) == float("inf")


@pytest.mark.parametrize("factor", [-3.0, 1.5, float("nan")])
def test_a_backward_that_is_not_repeated_is_refused(factor: float) -> None:
    """Sensitivity would be that of the second backward, the clip that of the first."""
    model = Stack().double()
    passes = Counter[str]()

    def changing(gradient: Tensor) -> Tensor:
        passes["all"] += 1
        return gradient * (1 if passes["all"] == 1 else factor)

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        output = module(batch)
        output.register_hook(changing)
        return output.flatten(1).square().mean(1).mean()

    with pytest.raises(GuaranteeError, match="brings the same gradients"):
        released(model, twice=True, loss_fn=loss_fn)
    assert passes["all"] == 2
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())


WIDE = numbers(ROWS, TOKENS, 12).double()


class ByHand(torch.autograd.Function):
    """Gradient checkpointing as people write it themselves."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        torch.autograd.backward(output, gradient)
        return None, x.grad


class ScaledGradient(torch.autograd.Function):
    """Makes a gradient smaller in place: a branch beside it reads the same memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(0.01)


class Wide(nn.Module):
    """Two square layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 2)


class Unseen(Wide):
    """A second use of a layer shows in the backward only."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda v: self.second(v).tanh(), self.first(x), use_reentrant=False)
        if self.again == "layer":
            return self.head(ByHand.apply(self.second, x))  # type: ignore[no-untyped-call]
        if self.again == "product":
            x = ByHand.apply(lambda v: v @ self.second.weight.T, x)  # type: ignore[no-untyped-call]
            return self.head(x)
        return self.head(checkpoint(self.second, x, use_reentrant=True))


class InPlace(Wide):
    """A residual branch writes to the gradient that a layer was handed."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)

        def block(v: Tensor) -> Tensor:
            return ScaledGradient.apply(v) + self.second(v)  # type: ignore[no-any-return, no-untyped-call]

        return self.head(checkpoint(block, x, use_reentrant=False))


class Unrepeated(Wide):
    """Random numbers that are others at each computation, and do little."""

    def forward(self, x: Tensor) -> Tensor:
        def block(v: Tensor) -> Tensor:
            v = self.second(v).tanh()
            return v * (1 + 0.01 * torch.randn((), dtype=v.dtype))

        x = checkpoint(self.first, x, use_reentrant=False)
        x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return self.head(x)


@pytest.mark.parametrize("again", ["layer", "product", "reentrant"])
def test_a_second_use_that_the_forward_hides_is_refused(
    monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """Unrefused, a unit adds the sum of two gradients under the norm of one."""
    monkeypatch.setattr(revisit, "room", lambda device: 0.0)
    with pytest.raises(GuaranteeError, match="the forward did not show"):
        released(Unseen(again).double(), WIDE, twice=True, clip_norm=1e-3)


def test_a_gradient_that_is_written_to_is_not_added_as_it_was(
    kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisit, "room", lambda device: 0.0)
    model = InPlace().double()
    one = released(model, WIDE, twice=False, clip_norm=1e-3)
    assert_close(released(model, WIDE, twice=True, clip_norm=1e-3), one)
    assert sorted(kept) == ["first.weight", "second.weight"]


def test_a_norm_grows_by_no_more_than_is_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisit, "room", lambda device: 0.0)
    model, refused = Unrepeated().double(), 0
    for seed in range(20):
        try:
            found = released(model, WIDE[:1], twice=True, weights=(1.0,), seed=seed, clip_norm=1e-3)
        except GuaranteeError:
            refused += 1
        else:
            assert norm(found) <= 1e-3 * (1 + plan_of().precision_slack)
    assert 0 < refused < 20


class Module(L.LightningModule):
    """A stack that is trained on squares."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Stack()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return squares(self.model, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnBackward(Module):
    """Its backward has no way to keep the graph."""

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()


class Manual(Module):
    """Calls backward and step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(squares(self.model, batch[0]))
        optimizer.step()


class Weighted(Manual):
    """Gives its backward a gradient, which a second backward would not have."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().manual_backward(loss, gradient=torch.tensor(3.0))


@pytest.mark.parametrize("kind", [Module, Manual, OwnBackward, Weighted])
@pytest.mark.filterwarnings("ignore:.*own backward", "ignore:.*overrides")
def test_a_fit(
    kept: list[str], monkeypatch: pytest.MonkeyPatch, kind: type[Module], tmp_path: Any
) -> None:
    monkeypatch.setattr(revisit, "room", lambda device: 0.0)
    torch.manual_seed(0)
    module = kind()
    manual = not module.automatic_optimization
    data = TensorDataset(torch.randn(16, TOKENS, WIDTH))
    privacy = DifferentialPrivacy(
        noise_multiplier=1.0, delta=1e-3, expected_batch_size=4, print_table=False, journal=False
    )
    trainer = L.Trainer(
        max_steps=3,
        callbacks=[privacy],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(data, batch_size=16 if manual else 4))
    assert privacy.steps == 3
    assert bool(kept) == (kind not in (OwnBackward, Weighted))
