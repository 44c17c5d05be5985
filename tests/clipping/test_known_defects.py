"""Defects that were measured in other implementations of DP-SGD, each as a test of this one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.clipping import clipped_gradient_sum, per_example_gradients
from lightning_privacy.clipping.checks import check_independence, learn
from lightning_privacy.errors import GuaranteeError
from tests.clipping.reference import (
    Sketch,
    assert_exact,
    clipped_by_hand,
    clipped_sum_of,
    difference,
    loop_gradients,
    norm,
    norms_of,
    numbers,
    run_micro_batch,
    squares,
    step_of,
    tokens,
    trainable,
)

B = 4


def test_a_weight_that_is_also_used_by_a_function_stays_within_the_bound() -> None:
    # Elsewhere only the module's own call was seen: 1.55 C.
    model = Sketch(
        lambda m, x: m.layer(x) + F.linear(x.sin(), m.layer.weight), layer=nn.Linear(30, 20)
    )
    x = 100 * numbers(B, 30)
    for row in range(B):
        alone = [float(i == row) for i in range(B)]
        assert norm(clipped_sum_of(model, squares, x, alone)) == pytest.approx(1.0, rel=1e-4)
    assert_exact(model, squares, numbers(B, 30))


def test_inputs_of_another_rank_leave_no_stale_norm() -> None:
    # Elsewhere norms of the last rank were used: 174 where 3 was promised.
    model = nn.Linear(6, 5)
    batches = [numbers(B, 3, 6), numbers(B, 2, 3, 6), numbers(B, 6), 1e3 * numbers(B, 3, 6)]
    expected = [clipped_by_hand(loop_gradients(model, squares, x), 1.0) for x in batches]
    step = step_of(model)
    for number, batch in enumerate(batches):
        run_micro_batch(step, model, squares, batch)
        step.release(number)
        found = {name: p.grad for name, p in model.named_parameters()}
        assert difference(found, expected[number]) < 1e-5
    step.close()


def test_a_layer_unfrozen_after_set_up_never_reaches_an_optimizer() -> None:
    # Elsewhere its raw gradient was used: 94 C.
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    step = step_of(model)
    model[0].requires_grad_(True)
    run_micro_batch(step, model, squares, numbers(B, 6))
    with pytest.raises(GuaranteeError, match="trainable parameter, of shape"):
        step.release(0, model.parameters())
    step.close()


def test_all_micro_batches_of_a_step_count() -> None:
    # Elsewhere accumulation kept only the last one.
    model = nn.Linear(6, 3)
    x = numbers(B, 6)
    expected = clipped_by_hand(loop_gradients(model, squares, x), 0.1)
    step = step_of(model, clip_norm=0.1)
    for row in range(B):
        run_micro_batch(step, model, squares, x[row : row + 1])
    step.release(0)
    assert difference({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-6
    step.close()


def test_the_norm_of_a_key_s_bias_is_no_difference_of_large_numbers() -> None:
    # A key's bias cancels in the softmax: its true gradient is zero, and elsewhere a Gram norm made
    # 1.7e-4 of it.
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True, bias=True)
    model = Sketch(lambda m, x: m.layer(x, x, x, need_weights=False)[0], layer=layer)
    x = numbers(B, 12, 16)
    gradients = per_example_gradients(model, squares, x)
    key_bias = gradients["layer.in_proj_bias"][:, 16:32]
    assert float(key_bias.norm()) < 1e-6 * norm(gradients)
    _, norms = clipped_gradient_sum(model, squares, x, 1.0)
    torch.testing.assert_close(norms.double(), norms_of(gradients), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "layer", [nn.RMSNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm(6), nn.GroupNorm(1, 6)]
)
def test_weights_of_normalisations_are_trained(layer: nn.Module) -> None:
    # Elsewhere RMSNorm was silently frozen, and LayerNorm without a bias an error.
    model = nn.Sequential(nn.Linear(6, 6), layer)
    found = per_example_gradients(model, squares, numbers(B, 6))
    assert set(found) == set(dict(model.named_parameters()))
    assert all((gradient != 0).any() for gradient in found.values())


def _uneven() -> dict[str, Tensor]:
    ids = tokens(B, 8, below=20) + 1
    real = torch.arange(8)[None] < torch.tensor([8, 2, 5, 3])[:, None]
    return {
        "input_ids": ids * real,
        "attention_mask": real.long(),
        "labels": torch.where(real, ids, -100),
    }


def test_the_token_mean_of_transformers_is_refused() -> None:
    # Elsewhere trained without a word: sensitivity 8.5 with C = 3.
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=30,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    data, parameters = _uneven(), trainable(model)

    def loss_of(rows: list[int]) -> Tensor:
        return model(**{name: value[list(rows)] for name, value in data.items()}).loss

    layouts = learn(model, parameters, loss_of, 0)
    with pytest.raises(GuaranteeError, match="mean over all tokens") as caught:
        check_independence(model, parameters, loss_of, range(B), layouts=layouts)
    assert caught.value.found.startswith("model.")


def test_an_empty_draw_through_a_language_model() -> None:
    # Elsewhere a batch without rows crashed: here it is one row that counts for nothing.
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=9)
    model = transformers.GPT2LMHeadModel(config)
    ids = tokens(1, 8, below=30)
    found = clipped_sum_of(
        model, lambda m, x: m(input_ids=x, labels=x).loss, ids, [0.0], noise_multiplier=0.0
    )
    assert norm(found) == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_one_broken_example_does_not_reach_the_weights(value: float) -> None:
    # Elsewhere all weights became NaN, or the step was skipped without noise and accounting.
    model = nn.Linear(6, 3)
    x = numbers(B, 6)
    x[1, 2] = value
    step = step_of(model, noise_multiplier=1.0)
    run_micro_batch(step, model, squares, x)
    statistics = step.release(0)
    assert statistics.nonfinite == 1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    step.close()


@pytest.mark.parametrize("shape", [(B, 6), (6, B, 6), (B, B, B)], ids=str)
def test_shapes_that_equal_the_number_of_rows_are_no_ambiguity(shape: tuple[int, ...]) -> None:
    width = shape[-1]
    model = Sketch(
        lambda m, x: m.layer(x) * m.scale + m.table[: x.shape[-2]],
        layer=nn.Linear(width, width),
        scale=(width,),
        table=(6, width),
    )
    assert_exact(model, squares, numbers(B, *shape))
