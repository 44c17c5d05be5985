"""Whole models of transformers, tiny and randomly initialised, used as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_privacy.accounting.precision import precision_slack_for
from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.errors import GuaranteeError
from tests.clipping.reference import (
    DOUBLE,
    SINGLE,
    Gradients,
    assert_close,
    assert_gradients,
    assert_sums,
    clipped_sum_of,
    difference,
    in_double,
    loop_gradients,
    norm,
    numbers,
    plain_gradient,
    rows_of,
    size_of,
    to_dtype,
    tokens,
    trainable,
)

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # Reentrant checkpointing of a first block whose inputs need no gradient.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]

B, LENGTH, WORDS = 3, 7, 40
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{**GROUPED, **changes})
    return transformers.LlamaForCausalLM(config)


def text(length: int = LENGTH) -> dict[str, Tensor]:
    ids = tokens(B, length, below=WORDS)
    return {"input_ids": ids, "labels": ids}


def sentences() -> dict[str, Tensor]:
    mask = torch.arange(LENGTH)[None] < torch.tensor([LENGTH, 2, 5])[:, None]
    return {
        "input_ids": tokens(B, LENGTH, below=WORDS),
        "attention_mask": mask.long(),
        "labels": tokens(B, below=2),
    }


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": numbers(B, 3, 8, 8), "labels": tokens(B, below=2)}


def speech() -> dict[str, Tensor]:
    return {"input_features": numbers(B, 6, 12), "labels": tokens(B, 5, below=WORDS - 3) + 3}


def pairs() -> dict[str, Tensor]:
    return {
        "input_ids": tokens(B, LENGTH, below=WORDS),
        "labels": tokens(B, 5, below=WORDS, seed=2),
    }


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES, **dropout, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


def _vit() -> nn.Module:
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2)
    return transformers.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=WORDS,
        num_mel_bins=6, max_source_positions=6, max_target_positions=9, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=WORDS,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED))


def _qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (llama, text),
    "llama tied": (lambda: llama(tie_word_embeddings=True), text),
    "llama as long as the batch": (llama, lambda: text(B)),
    "llama twice as long as the batch": (llama, lambda: text(2 * B)),
    "llama eager": (lambda: llama(attn_implementation="eager"), text),
    "qwen3": (_qwen3, text),
    "mistral": (_mistral, text),
    "gpt2": (_gpt2, text),
    "bert": (_bert, sentences),
    "vit": (_vit, pictures),
    "whisper": (_whisper, speech),
    "t5": (_t5, pairs),
}
SLOW = {"t5", "qwen3", "mistral", "whisper", "bert", "vit"}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss; all rows have as many targets, so that it is a mean over rows."""
    return model(**batch).loss


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def assert_model(model: nn.Module, batch: dict[str, Tensor], *, sums: bool = True) -> None:
    # In float32 over all parameters: a whole model's rounding shows in single ones, without privacy
    # as well.
    single = loop_gradients(model, loss_of, batch)
    assert difference(per_example_gradients(model, loss_of, batch), single) <= SINGLE * norm(single)
    with in_double():
        model, batch = model.double(), to_dtype(batch, torch.float64)
        expected = assert_gradients(model, loss_of, batch, DOUBLE)
        if sums:
            assert_sums(model, loss_of, batch, expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_sums(name: str) -> None:
    make, batch = MODELS[name]
    assert_model(built(make), batch())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS if " " not in n],
)
def test_with_gradient_checkpointing(name: str, reentrant: bool) -> None:
    make, batch = MODELS[name]
    model = built(make)
    if name == "t5" and reentrant:
        # Its relative bias is the output of one checkpointed block and the input of the next.
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(
            GuaranteeError, match=r"(?s)relative_attention_bias.*use_reentrant=False"
        ):
            per_example_gradients(model, loss_of, batch())
        return
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if name == "vit":
        model.vit.embeddings.register_forward_hook(lambda *a: a[-1].requires_grad_())
    assert_model(model, batch(), sums=not reentrant)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over examples of each example's own mean over its real tokens."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    scores = model(**inputs).logits[:, :-1].transpose(1, 2)
    real = batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(scores, batch["input_ids"][:, 1:], reduction="none")
    return ((losses * real).sum(1) / real.sum(1)).mean()


@pytest.mark.parametrize("make", [llama, _gpt2])
def test_rows_of_different_lengths(make: Callable[[], nn.Module]) -> None:
    with in_double():
        assert_gradients(built(make).double(), own_loss, sentences(), DOUBLE)


# ---------------------------------------------------------------------- parameter-efficient
ADAPTERS: dict[str, dict[str, Any]] = {
    "every linear layer": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True, "bias": "lora_only"},
    "weight-decomposed": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "a module in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a layer norm in full": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


def adapted(model: nn.Module, **changes: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**{**options, **changes})).train()


@pytest.mark.parametrize("name", ADAPTERS)
def test_low_rank_adapters(name: str) -> None:
    model = adapted(built(llama), **ADAPTERS[name])
    names = list(trainable(model))
    assert names
    assert len(names) < len(list(model.parameters()))
    assert_model(model, text())


@pytest.mark.parametrize("reentrant", [True, False])
def test_low_rank_adapters_with_gradient_checkpointing(reentrant: bool) -> None:
    base = built(llama)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    assert_model(adapted(base, target_modules="all-linear"), text(), sums=False)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_base_of_four_bits(tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    # The smallest width that four-bit blocks fill.
    built(lambda: llama(hidden_size=64, intermediate_size=64)).save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu"
    )
    assert "Params4bit" in {type(p).__name__ for p in base.parameters()}
    base = peft.prepare_model_for_kbit_training(
        base,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = adapted(base, target_modules="all-linear")
    expected = loop_gradients(model, loss_of, text())
    # The four-bit kernels are themselves only deterministic to float32 rounding.
    assert_close(per_example_gradients(model, loss_of, text()), expected, SINGLE)
    assert norm(expected) > 0


# ---------------------------------------------------------------------- low precision
def autocast_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, batch)


@pytest.mark.parametrize("how", ["true", "autocast"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_bfloat16(name: str, how: str) -> None:
    make, batch_of = MODELS[name]
    model, batch = built(make), batch_of()
    if how == "true":
        model, batch = model.bfloat16(), to_dtype(batch, torch.bfloat16)
    loss = loss_of if how == "true" else autocast_loss
    # Row by row and in a batch, bfloat16 rounds differently.
    expected = loop_gradients(model, loss, batch)
    found = per_example_gradients(model, loss, batch)
    whole = norm({n: found[n].double() - expected[n].double() for n in expected}) / norm(expected)
    assert whole < 2e-2
    total = plain_gradient(model, loss, batch)
    means = {n: g.float().mean(0) for n, g in found.items()}
    gap = norm({n: means[n].double() - total[n].double() for n in total}) / norm(total)
    assert gap < 2e-2
    bound = 1e-2
    for row in range(B):
        alone = [float(i == row) for i in range(B)]
        slack = precision_slack_for("bf16")
        changes = {"clip_norm": bound, "precision_slack": slack}
        assert norm(clipped_sum_of(model, loss, batch, alone, **changes)) <= bound * (1 + slack)


# ---------------------------------------------------------------------- dropout
def seeded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(11)
    return loss_of(model, batch)


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant", "adapters"])
def test_dropout_is_the_same_realisation_as_without_privacy(how: str) -> None:
    model = built(lambda: llama(attention_dropout=0.3, attn_implementation="eager"))
    if how == "adapters":
        model = adapted(model, target_modules="all-linear", lora_dropout=0.5)
    elif how != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    with in_double():
        model.double()
        found = per_example_gradients(model, seeded, text())
        means = {name: g.mean(0) for name, g in found.items()}
        assert_close(means, plain_gradient(model, seeded, text()), DOUBLE)
        assert differs_from_eval(model, found)


def differs_from_eval(model: nn.Module, found: Gradients) -> bool:
    model.eval()
    still = per_example_gradients(model, seeded, text())
    model.train()
    return norm({n: still[n] - found[n] for n in found}) > 1e-3 * norm(found)


def test_dropout_leaves_rows_apart() -> None:
    # Replace all other rows: the gradient of the first, with the same realisation, stays.
    model = built(lambda: llama(attention_dropout=0.3, attn_implementation="eager"))
    batch = text()
    other = {name: value.clone() for name, value in batch.items()}
    for value in other.values():
        value[1:] = value[1:].flip(1)
    with in_double():
        model.double()
        first = per_example_gradients(model, seeded, batch)
        second = per_example_gradients(model, seeded, other)
        assert_close(rows_of(second, [0]), rows_of(first, [0]), DOUBLE)
        assert norm({n: first[n] - second[n] for n in first}) > 0
    assert size_of(batch) == B
