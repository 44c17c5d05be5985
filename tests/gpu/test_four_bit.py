"""The same 4-bit weights on both devices: quantised on the CPU, moved byte by byte to the GPU.

Everything is computed in float32, so that nothing but the order of sums in the devices' kernels
differs: some 1e-6 of a gradient's norm.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.models._loading import made_up_base
from tests.gpu.test_engine import ROWS, TOKENS, VOCABULARY, language_loss, relative_error

pytestmark = [
    pytest.mark.gpu,
    # transformers renames, peft follows later.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

AGREE = 1e-4
CLIP = 0.05


def four_bit_llama() -> nn.Module:
    """A base in NF4 with double quantisation, and adapters whose two factors are both random."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
        # Large enough that the adapted layers matter to the loss.
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    base = made_up_base(
        config,
        task="causal_lm",
        quantization="nf4",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    adapters = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, adapters).train()


def moved(model: nn.Module, device: str) -> nn.Module:
    """A copy of the model on a device, its 4-bit weights as they are."""
    from bitsandbytes.nn import Params4bit

    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in [*module._parameters.items()]:
            if isinstance(parameter, Params4bit):
                module._parameters[name] = parameter.to(device)
            elif parameter is not None:
                value = parameter.detach().to(device)
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in [*module._buffers.items()]:
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def packed(model: nn.Module) -> dict[str, Tensor]:
    """The bytes of all 4-bit weights, and their quantised scales."""
    from bitsandbytes.nn import Linear4bit

    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    bytes_ = {name: layer.weight.data.cpu() for name, layer in layers.items()}
    scales = {f"{n}.absmax": layer.weight.quant_state.absmax.cpu() for n, layer in layers.items()}
    return {**bytes_, **scales}


def token_ids() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)


def on(device: str, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.to(device) for name, gradient in gradients.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_same_four_bit_weights_agree_on_both_devices(checkpointing: bool) -> None:
    ours = four_bit_llama()
    if checkpointing:
        ours.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    theirs = moved(ours, "cuda")
    before = packed(ours)
    assert len(before) == 28
    assert all(torch.equal(value, packed(theirs)[name]) for name, value in before.items())
    expected = per_example_gradients(ours, language_loss, token_ids())
    found = per_example_gradients(theirs, language_loss, token_ids().cuda())
    # The base takes part: without it the gradients are others.
    assert len(expected) == 28
    assert all(bool(gradient.any()) for gradient in expected.values())
    assert relative_error(on("cpu", found), expected) < AGREE


def test_clipped_sums_of_the_same_four_bit_weights_agree_on_both_devices() -> None:
    ours = four_bit_llama()
    theirs = moved(ours, "cuda")
    expected, norms = clipped_gradient_sum(ours, language_loss, token_ids(), CLIP)
    found, their_norms = clipped_gradient_sum(theirs, language_loss, token_ids().cuda(), CLIP)
    assert float(norms.min()) > CLIP
    torch.testing.assert_close(their_norms.cpu(), norms, rtol=AGREE, atol=0)
    assert relative_error(on("cpu", found), expected) < AGREE
