"""Noise in transformers' models: masks, padding, heads, checkpoints, caches, restoration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_privacy.attention import Injection, inject
from lightning_privacy.attention import transformers as ours
from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError

transformers = pytest.importorskip("transformers")

# The old name, which all supported versions know.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

TOKENS, VOCABULARY = 10, 61


def llama(implementation: str = "sdpa", **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        attn_implementation=implementation,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return model.train()


def ids(rows: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


@contextmanager
def noised(model: nn.Module, std: float = 0.5, **options: Any) -> Iterator[Injection]:
    layers = options.pop("layers", None)
    injection = Injection(std=std, seed=5, **options)
    remove = inject(model, injection, layers)
    try:
        injection.begin(0)
        yield injection
    finally:
        remove()


def logits(model: nn.Module, tokens: Tensor, mask: Tensor | None = None, **noise: Any) -> Tensor:
    with torch.no_grad(), noised(model, **noise):
        return model(input_ids=tokens, attention_mask=mask).logits


BOTH = pytest.mark.parametrize("where", ["logits", "weights"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@BOTH
@IMPLEMENTATIONS
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_without_noise_the_model_is_as_ever(implementation: str, where: str, side: str) -> None:
    model, mask = llama(implementation), torch.ones(3, TOKENS, dtype=torch.long)
    if side == "left":
        mask[1, :4] = 0
    if side == "right":
        mask[1, -4:] = 0
    with torch.no_grad():
        plain = model(input_ids=ids(), attention_mask=mask).logits
    real = mask.bool()
    for std in (0.0, 1e-9):
        found = logits(model, ids(), mask, std=std, where=where)
        torch.testing.assert_close(found[real], plain[real])
    noisy = logits(model, ids(), mask, where=where)
    assert float((noisy - plain)[real].abs().max()) > 1e-3


@BOTH
def test_eager_and_sdpa_meet_the_same_noise(where: str) -> None:
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, :4] = 0
    first, second = (logits(llama(name), ids(), mask, where=where) for name in ("sdpa", "eager"))
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()])


@BOTH
@IMPLEMENTATIONS
def test_what_comes_later_stays_masked(implementation: str, where: str) -> None:
    model, tokens = llama(implementation), ids()
    other = tokens.clone()
    other[:, 6:] = tokens[:, 6:] % (VOCABULARY - 1) + 1
    first, second = (logits(model, t, where=where) for t in (tokens, other))
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.equal(first[:, 6:], second[:, 6:])


@BOTH
@IMPLEMENTATIONS
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_example_has_its_noise_whatever_the_others_length(
    implementation: str, where: str, side: str
) -> None:
    model, tokens, wide = llama(implementation), ids(), TOKENS + 5
    alone = logits(model, tokens[:1], where=where)
    padded = torch.zeros(3, wide, dtype=torch.long)
    mask = torch.ones(3, wide, dtype=torch.long)
    own = slice(wide - TOKENS, wide) if side == "left" else slice(0, TOKENS)
    padded[1:] = ids(2, wide)
    padded[0, own], mask[0] = tokens[0], 0
    mask[0, own] = 1
    together = logits(model, padded, mask, where=where)
    # Rotary positions of a text moved to the right round a little differently.
    torch.testing.assert_close(together[0, own], alone[0], atol=2e-5, rtol=1e-4)


@BOTH
def test_examples_and_heads_layers_steps_and_calls_differ(where: str) -> None:
    model = llama()
    tokens = ids(1).expand(2, -1)
    with torch.no_grad(), noised(model, where=where) as injection:
        first, again = (model(input_ids=tokens).logits for _ in range(2))
        injection.begin(0)
        same = model(input_ids=tokens).logits
        injection.begin(1)
        later = model(input_ids=tokens).logits
    assert torch.equal(first, same)
    for other in (again, later, first.flip(0)):
        assert float((first - other)[:, 1:].abs().max()) > 1e-3
    keys = {injection.key(name, call) for name in ("a", "b") for call in range(3)}
    assert len(keys) == 6


def gradients(model: nn.Module, **noise: Any) -> list[Tensor]:
    model.zero_grad()
    with noised(model, **noise) as injection:
        for _ in range(2):  # micro-batches
            model(input_ids=ids()).logits.square().mean().backward()
            injection.after_backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_meets_the_same_noise_again(where: str, reentrant: bool) -> None:
    model = llama()
    plain = gradients(model, where=where)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for first, second in zip(plain, gradients(model, where=where), strict=True):
        torch.testing.assert_close(first, second)


def test_two_calls_before_a_checkpointed_backward_are_refused() -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with noised(model):
        loss = sum(model(input_ids=ids()).logits.square().mean() for _ in range(2))
        with pytest.raises(UnsupportedOperationError, match="called 2 times"):
            loss.backward()


@BOTH
def test_evaluation_is_left_alone_unless_asked(where: str) -> None:
    model = llama().eval()
    with torch.no_grad():
        plain = model(input_ids=ids()).logits
    torch.testing.assert_close(logits(model, ids(), where=where), plain)
    found = logits(model, ids(), where=where, at_inference=True)
    assert float((found - plain).abs().max()) > 1e-3


@BOTH
@IMPLEMENTATIONS
@pytest.mark.parametrize("cache", [True, False])
def test_generation_with_a_cache(implementation: str, where: str, cache: bool) -> None:
    model = llama(implementation).eval()
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": cache}

    def generate() -> Tensor:
        return model.generate(input_ids=ids(), attention_mask=mask, **options)

    plain = generate()
    with noised(model, std=1e-9, where=where, at_inference=True):
        assert torch.equal(generate(), plain)
    with noised(model, std=20.0, where=where, at_inference=True):
        assert not torch.equal(generate(), plain)
    assert torch.equal(generate(), plain)


def test_the_mask_functions_are_registered_with_the_attention_functions() -> None:
    """Without one, transformers makes no mask and the padding is silently attended to."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    with noised(llama()):
        for name in (ours._EAGER, ours._SDPA, ours._FLEX):
            assert name in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((0,), "0"), ((-1,), "1"), (("*.1.*",), "1"), (("*.1.*", 0), "01"), (None, "01")],
)
def test_only_the_chosen_layers_are_noised(layers: Any, expected: str) -> None:
    with noised(llama(), layers=layers) as injection:
        names = [layer.name for layer in injection.layers]
    assert names == [f"model.layers.{number}.self_attn" for number in expected]


@pytest.mark.parametrize("layers", [[7], ["encoder.*"], []])
def test_layers_that_are_not_there_are_refused(layers: list[Any]) -> None:
    with pytest.raises(ConfigurationError):
        inject(llama(), Injection(), layers)


@IMPLEMENTATIONS
def test_the_model_is_restored(implementation: str) -> None:
    model = llama(implementation)
    before = dict(vars(model.config))
    with pytest.raises(KeyboardInterrupt), noised(model):
        assert model.config._attn_implementation.startswith("lightning_privacy")
        raise KeyboardInterrupt
    assert vars(model.config) == before
    assert not any(ours.is_noised(module) for module in model.modules())
    assert not ours._active
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids()).logits, llama(implementation)(input_ids=ids()).logits
        )


def test_two_sources_of_noise_are_refused() -> None:
    model = llama()
    with noised(model):
        with pytest.raises(ConfigurationError, match="has one already"):
            inject(model, Injection())
    inject(model, Injection())()


def test_flex_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has a GPU"):
        inject(llama(), Injection(method="flex"))


def test_the_perturbation_grows_with_the_noise() -> None:
    model, found = llama(), []
    for std in (0.1, 0.5, 2.0):
        with noised(model, std=std) as injection:
            assert injection.perturbation() is None
            model(input_ids=ids())
            found.append(float(injection.perturbation()))
    assert 0 < found[0] < found[1] < found[2] < 1
    assert found[1] == pytest.approx(5 * found[0], rel=0.3)


def test_the_first_token_is_the_same_at_any_noise() -> None:
    """It attends to itself alone: the counter-example to privacy by noisy attention."""
    model = llama()
    quiet, loud = (logits(model, ids(), std=std)[:, 0] for std in (0.0, 1e3))
    torch.testing.assert_close(quiet, loud)


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertModel(
            transformers.BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                vocab_size=VOCABULARY,
                attention_probs_dropout_prob=0.0,
                hidden_dropout_prob=0.0,
            )
        ),
        lambda: transformers.GPT2Model(
            transformers.GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=4,
                vocab_size=VOCABULARY,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
            )
        ),
        lambda: transformers.Qwen3Model(
            transformers.Qwen3Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                vocab_size=VOCABULARY,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=1,
            )
        ),
    ],
    ids=["bert", "gpt2", "qwen3 with a sliding window"],
)
@BOTH
def test_other_models(make: Any, where: str) -> None:
    model = make().train()
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, -3:] = 0
    real = mask.bool()
    with torch.no_grad():
        plain = model(input_ids=ids(), attention_mask=mask).last_hidden_state
        found = []
        for std in (1e-9, 0.5):
            with noised(model, std=std, where=where) as injection:
                found.append(model(input_ids=ids(), attention_mask=mask).last_hidden_state)
                assert len(injection.layers) == 2
                assert all(layer.reached for layer in injection.layers)
    torch.testing.assert_close(found[0][real], plain[real])
    assert float((found[1] - plain)[real].abs().max()) > 1e-3
