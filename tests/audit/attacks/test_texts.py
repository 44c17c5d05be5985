"""All scores in one pass; adapters off is the model before fine-tuning; nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_privacy.audit.attacks import adapters_off, score_texts
from lightning_privacy.metrics.functional import membership_auroc
from lightning_privacy.models import CausalLanguageModel

# PEFT asks transformers for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def batches(seed: int = 0, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, 10), generator=draw)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            use_cache=False,
        )
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(30):
        for batch in batches():
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
    return model


def test_fine_tuning_shows_in_the_ratio_to_the_model_before(adapted: Any) -> None:
    trainable = [p.requires_grad for p in adapted.parameters()]
    inside = score_texts(adapted, batches(), texts=["x"] * 8)
    outside = score_texts(adapted, batches(seed=1), texts=["x"] * 8)
    assert set(inside) == {"loss", "zlib", "min_k", "min_k_plus_plus", "ratio"}
    member = torch.arange(16) < 8
    for name in inside:
        assert membership_auroc(torch.cat([inside[name], outside[name]]), member) > 0.9, name
    assert [p.requires_grad for p in adapted.parameters()] == trainable


def test_frozen_adapters_stay_frozen(adapted: Any) -> None:
    frozen = next(p for name, p in adapted.named_parameters() if "lora_B" in name)
    frozen.requires_grad_(False)
    score_texts(adapted, batches())
    assert not frozen.requires_grad
    frozen.requires_grad_(True)


def test_adapters_off_is_the_base_model(adapted: Any) -> None:
    batch = batches()[0]
    with torch.no_grad(), adapters_off(adapted) as found:
        off = adapted(**batch).logits
    assert found
    with torch.no_grad():
        torch.testing.assert_close(off, llama()(**batch).logits)
        assert not torch.allclose(off, adapted(**batch).logits)


def test_another_model_can_be_the_reference(adapted: Any) -> None:
    by_adapters = score_texts(adapted, batches())["ratio"]
    by_base = score_texts(adapted, batches(), reference=llama())["ratio"]
    torch.testing.assert_close(by_adapters, by_base)


def test_without_adapters_there_is_no_ratio() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    scores = score_texts(model, batches())
    assert set(scores) == {"loss", "min_k", "min_k_plus_plus"}
    assert model.training
    assert not model.model.layers[0].training
    assert score_texts(model, batches(), reference=None).keys() == scores.keys()


def test_a_module_that_takes_the_whole_batch() -> None:
    model = CausalLanguageModel(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2)
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    scores = score_texts(model, labelled)
    for batch in labelled:
        expected = -model.losses(batch)
        torch.testing.assert_close(scores["loss"][: len(expected)], expected.detach())
        break


def test_padding_is_not_scored() -> None:
    class Table(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.one_hot(batch["input_ids"], 64).float()

    (batch, *_) = batches()
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 3)),
    }
    for name, value in score_texts(Table(), [batch]).items():
        torch.testing.assert_close(value, score_texts(Table(), [longer])[name])
