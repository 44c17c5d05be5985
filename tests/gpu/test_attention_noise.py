"""Noise in attention inside the fused kernel: its numbers, gradients and memory, and no way out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import AttentionNoise, DifferentialPrivacy
from lightning_privacy.attention import Injection, flex, inject
from lightning_privacy.attention import transformers as ours
from lightning_privacy.attention.counter import Seed, noise_matrix
from lightning_privacy.attention.dense import logits_bias
from lightning_privacy.attention.flex import noisy_flex
from lightning_privacy.errors import UnsupportedOperationError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*(is|gradient)_(gradient_)?checkpointing.* is deprecated"),
    # What torch's compiler says of itself.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32", "ignore:.*Online softmax"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

VOCABULARY = 128


def parts(
    rows: int, heads: int, groups: int, tokens: int, width: int = 32, dtype: Any = torch.float32
) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": dtype}
    shapes = [(rows, h, tokens, width) for h in (heads, groups, groups)]
    return [torch.randn(shape, **options).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("tokens", [96, 200])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_kernel_meets_the_noise_of_the_matrix(groups: int, tokens: int, padding: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    injection = Injection(std=0.7)
    layer = injection.layer("layer")
    q, k, v = parts(3, 4, groups, tokens)
    real = torch.ones(3, tokens, dtype=torch.bool, device="cuda")
    if padding != "none":
        real[1, slice(0, 9) if padding == "left" else slice(-9, None)] = False
    begin = real.to(torch.uint8).argmax(-1).to(torch.int32)
    block = create_block_mask(
        lambda b, _h, i, j: (i >= j) & real[b, j], 3, None, tokens, tokens, device="cuda"
    )
    injection.begin(0)
    found = noisy_flex(layer, q, k, v, scale=0.2, block_mask=block, first_key=begin)
    injection.begin(0)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril() & real[:, None, None]
    expected = F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(4 // groups, 1),
        v.repeat_interleave(4 // groups, 1),
        logits_bias(layer, q, k, mask, 0.2),
        scale=0.2,
    )
    shown = real[:, None, :, None]
    up = torch.randn(found.shape, device="cuda") * shown
    tolerance = {"atol": 5e-3, "rtol": 5e-3}  # the kernel may multiply in TF32
    torch.testing.assert_close(found * shown, expected * shown, **tolerance)
    for first, second in zip(
        torch.autograd.grad(found, (q, k, v), up),
        torch.autograd.grad(expected, (q, k, v), up),
        strict=True,
    ):
        scale = float(second.abs().max())
        assert float((first - second).abs().max()) < 1e-2 * scale


def test_the_numbers_are_those_of_the_cpu() -> None:
    shape = (2, 3, 128, 128)
    on_cpu = noise_matrix(Seed.of(7, torch.device("cpu")), shape)
    assert torch.equal(noise_matrix(Seed.of(7, torch.device("cuda")), shape).cpu(), on_cpu)


def test_no_matrix_is_held() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = 4096
    layer = Injection(std=0.1).layer("layer")
    block = create_block_mask(
        lambda _b, _h, i, j: i >= j, None, None, tokens, tokens, device="cuda"
    )
    peaks = []
    for noise in (None, layer):
        for _ in range(2):
            q, k, v = parts(1, 16, 16, tokens, 64, torch.bfloat16)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            noisy_flex(noise, q, k, v, scale=0.1, block_mask=block).sum().backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    matrix = 16 * tokens**2 * 2
    assert peaks[1] - peaks[0] < matrix / 20


def test_many_lengths_and_sizes_of_noise_stay_compiled() -> None:
    injection = Injection(std=0.1)
    layer = injection.layer("layer")
    for step in range(24):
        injection.std, tokens = 0.1 + step / 100, 64 + 8 * step
        injection.begin(step)
        q, k, v = parts(2, 2, 2, tokens)
        noisy_flex(layer, q, k, v, scale=0.2).sum().backward()


def test_attention_that_is_not_compiled_is_refused() -> None:
    """The stance of a private step is overruled; where nothing can be compiled, it is an error."""
    q, k, v = parts(1, 2, 2, 64)
    with torch.compiler.set_stance("force_eager"):
        flex.fused(q, k, v).sum().backward()
        with pytest.raises(UnsupportedOperationError, match="uncompiled"):
            torch.compile(flex._attention)(q, k, v, None, None, None, {})


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_weights_and_logits_equal_the_dense_method(where: Any) -> None:
    model = language_model(None)
    found = []
    for method in ("auto", "dense"):
        injection = Injection(std=0.5, where=where, method=method, seed=3)
        remove = inject(model, injection)
        try:
            injection.begin(0)
            model.zero_grad()
            loss(model, *batch()).backward()
            injection.after_backward()
        finally:
            remove()
        effect = float(injection_effect(injection, model))
        # A weight is 1/40 on average, and noise of 0.5 many times that.
        assert 0.01 < effect < (1 if where == "logits" else 50)
        found.append([p.grad.clone() for p in model.parameters()])
    assert relative(found) < 1e-2


def injection_effect(injection: Injection, model: nn.Module) -> Tensor:
    remove = inject(model, injection)
    injection.begin(1)
    with torch.no_grad():
        loss(model, *batch())
    effect = injection.perturbation()
    remove()
    assert effect is not None
    return effect


def relative(found: list[list[Tensor]]) -> float:
    total = sum(float(g.square().sum()) for g in found[0])
    apart = sum(float((a - b).square().sum()) for a, b in zip(*found, strict=True))
    return (apart / total) ** 0.5


def language_model(reentrant: bool | None, four_bit: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).cuda()
    if four_bit:
        model = with_four_bits(model)
    if reentrant is not None:
        base = model.base_model.model if four_bit else model
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
    return model.train()


def with_four_bits(model: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                layer.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(module, name, layer.cuda())
    model.requires_grad_(False)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )


def batch(rows: int = 4, tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * (row % 3)] = 0
    return ids.cuda(), mask.cuda()


def loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    real = mask[:, 1:] * mask[:, :-1]
    return ((losses.view_as(real) * real).sum(1) / real.sum(1)).mean()


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_a_checkpoint_meets_the_same_noise(where: Any) -> None:
    found = []
    for reentrant in (None, False, True):
        model = language_model(reentrant)
        injection = Injection(std=0.5, where=where, seed=3)
        remove = inject(model, injection)
        injection.begin(0)
        loss(model, *batch()).backward()
        remove()
        found.append([p.grad.clone() for p in model.parameters()])
    for other in found[1:]:
        assert relative([found[0], other]) < 1e-4


class Language(pl.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss(self.model, *batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.model, *batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("where", ["logits", "weights"])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_a_private_fit(where: Any, four_bit: bool, reentrant: bool | None, tmp_path: Any) -> None:
    """The checks before and during the fit pass, noise arrives, and the model is restored."""
    model = language_model(reentrant, four_bit)
    noise = AttentionNoise(0.5, where, seed=1)
    privacy = DifferentialPrivacy(
        noise_multiplier=1.0, delta=1e-4, expected_batch_size=8, print_table=False, journal=False
    )
    ids, mask = batch(rows=32)
    data = DataLoader(TensorDataset(ids.cpu(), mask.cpu()), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=3,
        precision="bf16-mixed" if four_bit else "32-true",
        callbacks=[privacy, noise],
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Language(model), data, data)
    assert 0.01 < float(noise.perturbation) < (1 if where == "logits" else 50)
    assert privacy.steps == 12
    base = model.base_model.model if four_bit else model
    assert base.config._attn_implementation == "sdpa"
    assert not any(ours.is_noised(part) for part in model.modules())


def test_generation_with_a_cache() -> None:
    model = language_model(None).eval()
    ids, mask = batch(2, 20)
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(input_ids=ids, attention_mask=mask, **options)
    with AttentionNoise(1e-6, at_inference=True).applied_to(model):
        same = model.generate(input_ids=ids, attention_mask=mask, **options)
    with AttentionNoise(20.0, at_inference=True).applied_to(model):
        other = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(plain, same)
    assert not torch.equal(plain, other)


def test_what_a_kernel_cannot_do_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        attention_dropout=0.1,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).cuda().train()
    remove = inject(model, Injection(std=0.1))
    with pytest.raises(UnsupportedOperationError, match=r"attention dropout 0\.1"):
        loss(model, *batch())
    remove()
    remove = inject(model, Injection(std=0.1, method="dense"))
    loss(model, *batch()).backward()
    remove()
    model.config._attn_implementation = "eager"
    with pytest.warns(UserWarning, match="attention eagerly"):
        inject(model, Injection(std=0.1))()
