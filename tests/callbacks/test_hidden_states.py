"""`PrivateHiddenStates`: what passes the cut, how often, and what is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_privacy.accounting.gaussian import gaussian_epsilon, gaussian_noise_multiplier
from lightning_privacy.attention.cut import Cut, clipped_states
from lightning_privacy.callbacks import PrivateHiddenStates
from lightning_privacy.errors import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
    UnsupportedOperationError,
)
from tests.callbacks.training import LIGHTNING_NOISE, privacy, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]

ROWS, LENGTH, WIDTH = 24, 5, 8


class Encoder(nn.Module):
    """Tokens in, one state for each; `mixed` holds what a test adds below."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mixed = nn.Embedding(16, WIDTH), nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return self.mixed(self.embed(ids))


class Reader(pl.LightningModule):
    """A classifier of token sequences, cut behind its frozen encoder."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = Encoder().requires_grad_(False)
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.seen: list[Tensor] = []

    def above(self, states: Tensor, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(states)).mean(1))

    def logits(self, ids: Tensor) -> Tensor:
        states = self.encoder(ids)
        self.seen.append(states.detach())
        return self.above(states, ids)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.logits(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(**options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 16, (ROWS, LENGTH), generator=generator)
    return DataLoader(TensorDataset(ids, ids[:, 0] % 2), batch_size=8, **options)


def cut(**options: Any) -> PrivateHiddenStates:
    defaults = {"clip_norm": 1.5, "epsilon": 8.0, "delta": 1e-5, "passes": 3}
    return PrivateHiddenStates(options.pop("cut", "encoder"), **{**defaults, **options})


def test_the_multiplier_is_that_of_balle_and_wang() -> None:
    for epsilon, multiplier in ((1.0, 3.730632), (3.0, 1.391), (8.0, 0.600)):
        found = gaussian_noise_multiplier(epsilon, 1e-5)
        assert found == pytest.approx(multiplier, rel=1e-3)
        # The formula itself: delta of this multiplier and epsilon.
        a, b = 1 / (2 * found), epsilon * found
        delta = stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)
        assert 0.999e-5 < delta <= 1e-5
        assert epsilon * 0.99999 < gaussian_epsilon(found, 1e-5) <= epsilon
    assert gaussian_noise_multiplier(1.0, 1e-5, 9) == pytest.approx(3 * 3.730632, rel=1e-4)
    assert gaussian_epsilon(2.0, 1e-5, 0) == 0


def test_no_state_is_longer_than_the_bound() -> None:
    states = torch.randn(6, 50, 40) * torch.logspace(-3, 15, 6)[:, None, None]
    states[3, 0, 0], states[4, 0, 0] = math.nan, math.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        norms = clipped_states(states.to(dtype), 2.0).double().flatten(1).norm(dim=1)
        assert float(norms.max()) <= 2.0
        assert norms[3] == norms[4] == 0
    short = torch.full((1, 4), 0.1)
    torch.testing.assert_close(clipped_states(short, 2.0), short)
    far = clipped_states(torch.stack([states[5], -states[5]]), 2.0)
    assert 3.999 < float((far[0] - far[1]).norm()) <= 4.0


def test_what_is_seen_is_the_clipped_state_with_the_accounted_noise(tmp_path: Path) -> None:
    module, callback = Reader(), cut(epsilon=50.0)
    trainer(tmp_path, callback, max_epochs=3).fit(module, data())
    plain = torch.cat([Reader().encoder(batch[0]) for batch in data()])
    noise = torch.cat(module.seen) - clipped_states(plain, 1.5).repeat(3, 1, 1)
    assert stats.kstest(noise.flatten().numpy() / callback.noise_std, "norm").pvalue > 1e-6
    # Of 2,880 numbers: by chance further away once in ten million runs.
    assert float(noise.std()) == pytest.approx(callback.noise_std, rel=0.07)
    # Two by two: single numbers of float32 meet by chance once in some ten runs.
    pairs = noise.reshape(-1, 2)
    assert len(pairs.unique(dim=0)) == len(pairs)
    assert callback.noise_std == pytest.approx(3 * gaussian_noise_multiplier(50.0, 1e-5, 3))


def test_passes_are_counted_and_end(tmp_path: Path) -> None:
    module, callback = Reader(), cut(passes=4)
    runner = trainer(tmp_path, callback, max_epochs=2)
    runner.fit(module, data(shuffle=True))
    assert callback.passes_made == 2
    assert 0 < callback.epsilon() < 8.0
    runner.validate(module, data(), verbose=False)
    runner.predict(module, data())
    assert callback.passes_made == 4
    assert 7.999 < callback.epsilon() <= 8.0
    with pytest.raises(BudgetExceededError, match="at most 4 times"):
        runner.predict(module, data())
    assert not module.encoder._forward_hooks


def test_validation_within_a_fit_counts(tmp_path: Path) -> None:
    callback = cut(passes=5)
    trainer(tmp_path, callback, max_epochs=2, num_sanity_val_steps=1).fit(Reader(), data(), data())
    assert callback.passes_made == 5


def test_two_calls_in_a_step_are_two_passes(tmp_path: Path) -> None:
    class Twice(Reader):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logits(batch[0])
            return super().training_step(batch, batch_idx)

    callback = cut(passes=2)
    trainer(tmp_path, callback, max_epochs=1).fit(Twice(), data())
    assert callback.passes_made == 2


def test_nothing_below_learns(tmp_path: Path) -> None:
    module, before = Reader(), weights(Reader())
    trainer(tmp_path, cut(), max_epochs=2).fit(module, data())
    changed = {
        name for name, value in weights(module).items() if not torch.equal(value, before[name])
    }
    assert changed == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(p.grad is None for p in module.encoder.parameters())


class Residual(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def above(self, states: Tensor, ids: Tensor) -> Tensor:
        return super().above(states + self.inner(states), ids)


class WithoutGradients(Residual):
    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.encoder(ids)
        return self.above(states, ids)


class WithoutParameters(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()


class WithNeither(WithoutGradients):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()


class ReadsAgain(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Embedding(16, WIDTH)

    def above(self, states: Tensor, ids: Tensor) -> Tensor:
        return super().above(states + self.second(ids), ids)


class Floats(Reader):
    """Numbers in, which are used again above the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(LENGTH, WIDTH).requires_grad_(False)

    def logits(self, ids: Tensor) -> Tensor:
        numbers = ids.float()
        return self.head(self.below(numbers)) + numbers.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "where", "message"),
    [
        (Residual, "inner", "computed below"),
        (WithoutGradients, "inner", "computed below"),
        (WithoutParameters, "inner", "computed below"),
        (WithNeither, "inner", "computed below"),
        (ReadsAgain, "encoder", "second reads the input again"),
        (Floats, "below", "computed below"),
        (Reader, "norm", "trainable: norm.weight"),
    ],
)
def test_a_way_past_the_cut_is_refused(kind: Any, where: str, message: str, tmp_path: Path) -> None:
    module = kind()
    with pytest.raises(GuaranteeError, match=message):
        trainer(tmp_path, cut(cut=where)).fit(module, data())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_cut_that_is_not_passed_is_refused(tmp_path: Path) -> None:
    class Unused(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2).requires_grad_(False)

    with pytest.raises(GuaranteeError, match="not passed at all"):
        trainer(tmp_path, cut(cut="unused")).fit(Unused(), data())


@pytest.mark.parametrize("affine", [True, False])
def test_examples_mixed_below_are_refused(affine: bool, tmp_path: Path) -> None:
    module = Reader()
    module.encoder.mixed = nn.BatchNorm1d(LENGTH, affine=affine).requires_grad_(False)
    with pytest.raises(GuaranteeError, match="one by one"):
        trainer(tmp_path, cut()).fit(module, data())
    module = Reader()
    module.encoder.mixed = nn.BatchNorm1d(LENGTH, affine=affine).requires_grad_(False).eval()
    trainer(tmp_path, cut()).fit(module, data())


def test_loaders_that_repeat_examples_are_refused(tmp_path: Path) -> None:
    dataset = data().dataset
    loader = DataLoader(dataset, 8, sampler=RandomSampler(dataset, replacement=True))
    with pytest.raises(UnsupportedOperationError, match="drawn once in a pass"):
        trainer(tmp_path, cut()).fit(Reader(), loader)


def test_two_kinds_of_privacy_in_one_fit_are_refused(tmp_path: Path) -> None:
    for pair in ([cut(), privacy()], [privacy(), cut()]):
        with pytest.raises(UnsupportedOperationError, match="without DifferentialPrivacy"):
            trainer(tmp_path, *pair).fit(Reader(), data())


@pytest.mark.parametrize(
    "settings",
    [{"clip_norm": 0.0}, {"epsilon": math.inf}, {"delta": 1.0}, {"passes": 0}, {"cut": "nowhere"}],
)
def test_arguments_outside_their_range(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        trainer(tmp_path, cut(**settings)).fit(Reader(), data())


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, cut(), saving, max_epochs=2).fit(Reader(), data())
    callback = cut()
    trainer(tmp_path, callback, max_epochs=3).fit(
        Reader(), data(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert callback.passes_made == 3
    with pytest.raises(BudgetExceededError):
        trainer(tmp_path, callback, max_epochs=1).fit(Reader(), data())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_meets_the_same_release(reentrant: bool) -> None:
    made: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        made.append(torch.randn(like.shape))
        return made[-1]

    below, above = nn.Linear(4, 4), nn.Linear(4, 4)
    gate = Cut("below", 1.0, draw)

    def block(x: Tensor) -> Tensor:
        return above(gate(below(x))).tanh()

    checkpoint(
        block, torch.randn(2, 4, requires_grad=True), use_reentrant=reentrant
    ).sum().backward()
    assert len(made) == gate.calls == 1
    assert below.weight.grad is None
    assert above.weight.grad is not None
    gate.after_backward()
    outputs = [checkpoint(block, torch.randn(2, 4, requires_grad=True), use_reentrant=reentrant)
               for _ in range(2)]  # fmt: skip
    with pytest.raises(UnsupportedOperationError, match="passed once before a backward"):
        sum(output.sum() for output in outputs).backward()


@pytest.mark.parametrize("output", [(torch.ones(2, 3), torch.ones(2)), torch.ones(2), "text", ()])
def test_a_module_with_other_outputs_is_refused(output: Any) -> None:
    gate = Cut("m", 1.0, torch.zeros_like)
    with pytest.raises(UnsupportedOperationError, match="one tensor of numbers"):
        gate(output)
    assert len(gate((torch.ones(2, 3), None))) == 2
