"""What only a GPU can show: autograd's device threads, low precision, 4-bit bases, noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.accounting.precision import precision_slack_for
from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.noise import GaussianNoise, fresh_secret, secret_from_seed

pytestmark = pytest.mark.gpu

ROWS, TOKENS, VOCABULARY = 4, 24, 128


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1).mean()


def tiny_llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
        **options,
    )
    return LlamaForCausalLM(config).cuda().train()


def token_ids() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator).cuda()


def one_at_a_time(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    rows = []
    for row in range(len(ids)):
        model.zero_grad(set_to_none=True)
        language_loss(model, ids[row : row + 1]).backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    model.zero_grad(set_to_none=True)
    return {name: torch.stack([own[name] for own in rows]) for name in rows[0]}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum(
        float((found[n].double() - g.double()).square().sum()) for n, g in expected.items()
    )
    return (difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_the_loop_with_and_without_checkpointing(
    reentrant: bool | None, tied: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    found = per_example_gradients(model, language_loss, token_ids())
    assert relative_error(found, one_at_a_time(model, token_ids())) < 1e-5


# In bfloat16 one row alone goes through other kernels than in a batch, and each rounds to 8 bits.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_four_bit_base_with_lora(checkpointing: bool, dtype: torch.dtype, bound: float) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tiny_llama()
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4"
                )
                layer.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data.cpu(), requires_grad=False, quant_type="nf4"
                )
                setattr(module, name, layer.cuda())
    model.requires_grad_(False)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, config).cuda().train()

    def loss(module: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return language_loss(module, ids)

    found = per_example_gradients(model, loss, token_ids())
    rows = []
    for row in range(ROWS):
        model.zero_grad(set_to_none=True)
        loss(model, token_ids()[row : row + 1]).backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    expected = {name: torch.stack([own[name] for own in rows]) for name in rows[0]}
    assert relative_error(found, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_contribution_exceeds_the_bound(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    ids = token_ids()
    for row in range(ROWS):
        total, norms = clipped_gradient_sum(model, language_loss, ids[row : row + 1], 0.1)
        size = sum(float(g.double().square().sum()) for g in total.values()) ** 0.5
        assert float(norms[0]) > 0.1
        assert size <= 0.1 * (1 + (1e-4 if dtype == torch.float32 else 2e-2))


def test_noise_on_cuda_is_normal_and_of_the_size_asked_for() -> None:
    noise = GaussianNoise(fresh_secret())
    values = (
        noise.sample("weight", torch.empty(400_000, device="cuda"), 0, 3.0).double().cpu() / 3.0
    )
    squares = float(values.square().sum())
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 400_000)
    assert low < squares < high
    assert stats.kstest(values[:100_000].numpy(), "norm").pvalue > 1e-6


def test_noise_on_cuda_depends_on_every_bit_of_the_key() -> None:
    like = torch.empty(1000, device="cuda")
    secrets = [secret_from_seed(7), secret_from_seed(7 + 2**32), secret_from_seed(7 + 2**64)]
    draws = [GaussianNoise(secret).sample("weight", like, 0, 1.0) for secret in secrets]
    assert torch.equal(draws[0], GaussianNoise(secrets[0]).sample("weight", like, 0, 1.0))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack((draws[first], draws[second])))[0, 1])) < 0.2


def test_a_private_fit_on_the_gpu(tmp_path: Path) -> None:
    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_privacy import DifferentialPrivacy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return language_loss(self.model, batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    data = TensorDataset(torch.randint(0, VOCABULARY, (32, TOKENS)))
    callback = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, expected_batch_size=8)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=6,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, DataLoader(data, batch_size=4))
    assert callback.steps == 6
    assert 0 < callback.epsilon() < float("inf")
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())


class Adapters(nn.Module):
    """Only small matrices, whose gradients all lie in the buffer."""

    def __init__(self, width: int = 64, rank: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            x = x + pair(x)
        return x


class Dense(nn.Module):
    """More large matrices than there are sums before the first wait."""

    def __init__(self, width: int = 64, layers: int = 20) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / 8
        return x


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the processor waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def private_sum(model: nn.Module, x: Tensor, weights: tuple[float, ...]) -> dict[str, Tensor]:
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.step import PrivateStep
    from lightning_privacy.types import NeighbouringRelation

    plan = PrivacyPlan(
        relation=NeighbouringRelation.ADD_OR_REMOVE,
        noise_multiplier=1.0,
        delta=1e-5,
        sample_rate=0.5,
        steps=9,
        expected_batch_size=1,
        clip_norm=1.0,
        precision_slack=precision_slack_for("bf16"),
    )
    named = dict(model.named_parameters())
    step = PrivateStep(parameters=named, plan=plan, noise=NoNoise())
    for _ in range(2):  # the first round compiles kernels, which waits
        step.discard()
        step.begin(weights)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean((1, 2)).mean()
        step.arm()
        loss.backward()
        with no_waiting() if isinstance(model, Adapters) else nullcontext():
            step.end()
            step.release(0, signal=False)
    return {name: parameter.grad.clone() for name, parameter in named.items()}


class NoNoise:
    sum_dtype = torch.float32

    def sample(self, name: str, like: Tensor, release: int, std: float) -> Tensor:
        return torch.zeros_like(like)

    def add_(self, tensor: Tensor, name: str, release: int, std: float) -> Tensor:
        return tensor


@pytest.mark.parametrize("kind", [Adapters, Dense])
def test_a_unit_that_is_not_finite_adds_exactly_nothing(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().cuda()
    x = torch.randn(ROWS, 256, 64, device="cuda")
    whole = private_sum(model, x, (0.0, 1.0, 1.0, 1.0))
    poisoned = x.clone()
    poisoned[0, 3, 5] = float("nan")
    found = private_sum(model, poisoned, (1.0, 1.0, 1.0, 1.0))
    assert all(torch.equal(found[name], gradient) for name, gradient in whole.items())
    assert any(bool(gradient.any()) for gradient in whole.values())
