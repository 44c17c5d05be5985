from __future__ import annotations

from types import SimpleNamespace

import lightning
import pytest
import torch
import torch.nn.functional as F

from lightning_privacy.data import SecretsCorpus, SyntheticSecrets
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models import CausalLanguageModel, example_losses
from lightning_privacy.models.base import learning_rate_factor

pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 1}


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    ids = torch.randint(0, 256, (len(lengths), width), generator=generator)
    kept = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~kept, 258),
        "labels": ids.masked_fill(~kept, -100),
        "attention_mask": kept.long(),
    }


def test_the_loss_of_a_row_is_its_own_mean_per_token():
    batch = batch_of(9, 4, 1)
    logits = torch.randn(3, 9, 259, generator=torch.Generator().manual_seed(1))
    losses = example_losses(logits, batch["labels"])
    for row, length in enumerate((9, 4)):
        expected = F.cross_entropy(logits[row, : length - 1], batch["labels"][row, 1:length])
        torch.testing.assert_close(losses[row], expected)
    assert losses[2] == 0.0


def test_a_row_depends_on_itself_alone():
    model = CausalLanguageModel(**TINY)
    batch = batch_of(12, 5, 8)
    together = model.losses(batch)
    for row, length in enumerate((12, 5, 8)):
        alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
        torch.testing.assert_close(together[row : row + 1], model.losses(alone))


def test_the_gradient_of_the_loss_is_the_mean_of_the_examples_own_gradients():
    model = CausalLanguageModel(**TINY).double()
    batch = batch_of(12, 5)
    model.losses(batch).mean().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, length in enumerate((12, 5)):
        alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
        (model.losses(alone).mean() / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name])


def trainer_of(**settings) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def small_data() -> SyntheticSecrets:
    return SyntheticSecrets(SecretsCorpus(n_users=20), batch_size=8)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_it_trains_and_logs():
    model = CausalLanguageModel(**TINY, learning_rate=1e-2, schedule="cosine", warmup_steps=2)
    data, trainer = small_data(), trainer_of(max_epochs=4)
    start = trainer.validate(model, data, verbose=False)[0]["val_loss"]
    trainer.fit(model, data)
    assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["val_loss"] < start - 0.5
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    test = trainer.test(model, data, verbose=False)[0]["test_loss"]
    rows = torch.cat(trainer.predict(model, data))
    assert rows.mean().item() == pytest.approx(test, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_checkpoint_loads_into_the_same_model(tmp_path):
    model = CausalLanguageModel(**TINY)
    trainer = trainer_of(max_steps=1)
    trainer.fit(model, small_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CausalLanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    batch = batch_of(7, 3)
    torch.testing.assert_close(loaded.losses(batch), model.losses(batch))


def test_the_learning_rate_rises_and_falls():
    steps = [learning_rate_factor(step, "cosine", 4, 20) for step in range(21)]
    assert steps[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert steps[4:] == sorted(steps[4:], reverse=True)
    assert steps[-1] == pytest.approx(0.0)
    assert learning_rate_factor(12, "linear", 4, 20) == pytest.approx(0.5)
    assert learning_rate_factor(10**6, "constant", 4, 0) == 1.0
    assert learning_rate_factor(10**6, "linear", 0, 10) == 0.0


def test_checkpointing_and_tied_embeddings_give_the_same_kind_of_model():
    model = CausalLanguageModel(**TINY, tie_embeddings=True, gradient_checkpointing=True)
    model.train()
    model.losses(batch_of(5, 6)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    names = dict(model.named_parameters())
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 30, "num_heads": 4},
        {"num_heads": 4, "num_key_value_heads": 3},
        {"num_key_value_heads": 0},
    ],
)
def test_heads_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigurationError, match="hidden_size"):
        CausalLanguageModel(**sizes)


@pytest.mark.parametrize("name", ["vocab_size", "max_length"])
def test_data_that_do_not_fit_the_model_are_refused(name):
    model = CausalLanguageModel(**TINY, vocab_size=259, max_length=96)
    data = SimpleNamespace(**{"vocab_size": 259, "max_length": 96, name: 1000})
    model._trainer = SimpleNamespace(datamodule=data)
    with pytest.raises(ConfigurationError, match=f"model.{name}.* to 1000"):
        model.setup("fit")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_falling_schedule_needs_an_end():
    model = CausalLanguageModel(**TINY, schedule="linear")
    with pytest.raises(ConfigurationError, match="max_steps"):
        trainer_of(max_epochs=-1, max_time={"seconds": 1}).fit(model, small_data())
