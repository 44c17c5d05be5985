"""One class for any subset of text, image and audio, whose examples do not know of each other."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.data import GlyphCorpus, GlyphsAndTones
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models import (
    AudioSettings,
    ImageSettings,
    PretrainedDecoder,
    PrivacyPreserveNet,
    SmallDecoder,
)
from tests.clipping.reference import (
    DOUBLE,
    SINGLE,
    assert_gradients,
    difference,
    in_double,
    loop_gradients,
    norm,
    to_dtype,
)

pytest.importorskip("transformers")

SMALL = SmallDecoder(hidden_size=16, num_layers=1, num_heads=2, num_key_value_heads=1)
LARGE = PretrainedDecoder(
    config_values={
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 300,
    },
    rank=2,
    dtype="float32",
    gradient_checkpointing=False,
)
# A token that reads all places, behind as little as possible.
SUMMARY = {
    "image": ImageSettings(hidden_size=8, grid=2, layers=1, summary=1),
    "audio": AudioSettings(features=8, hidden_size=8, tokens=3, layers=0, summary=2),
}
SUBSETS = [["text"], ["image"], ["audio"], ["image", "audio"], ["text", "image", "audio"]]


def net(**settings) -> PrivacyPreserveNet:
    small = {
        "decoder": SMALL,
        "image": ImageSettings(hidden_size=8, grid=2),
        "audio": AudioSettings(features=8, hidden_size=8, tokens=2),
    }
    return PrivacyPreserveNet(**(small | settings))


def batch_of(*lengths: int, tokens: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(0, 256, (rows, width), generator=generator)
    kept = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~kept, 258),
        "attention_mask": kept.long(),
        "labels": ids.masked_fill(~kept, -100) if tokens else torch.arange(rows) % 10,
        "image": torch.randn(rows, 1, 12, 12, generator=generator),
        "image_mask": torch.ones(rows, dtype=torch.bool),
        "audio": torch.randn(rows, 8, 9, generator=generator),
        "audio_mask": torch.arange(rows) != 1,
    }


def row_of(batch: dict[str, torch.Tensor], row: int, length: int) -> dict[str, torch.Tensor]:
    own = {name: value[row : row + 1] for name, value in batch.items()}
    names = ["input_ids", "attention_mask"] + (["labels"] if own["labels"].dim() == 2 else [])
    return own | {name: own[name][:, :length] for name in names}


@pytest.mark.parametrize("sizes", [{}, SUMMARY], ids=["cells", "summary"])
@pytest.mark.parametrize("pooling", ["mean", "modalities", "last"])
@pytest.mark.parametrize("modalities", SUBSETS, ids="+".join)
def test_a_row_depends_on_itself_alone(modalities, pooling, sizes):
    model = net(modalities=modalities, pooling=pooling, **sizes)
    batch = batch_of(9, 4, 6)
    together = model.losses(batch)
    for row, length in enumerate((9, 4, 6)):
        alone = model.losses(row_of(batch, row, length))
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("sizes", [{}, SUMMARY], ids=["cells", "summary"])
@pytest.mark.parametrize("pooling", ["mean", "modalities", "last"])
def test_gradients_are_those_of_a_loop_over_single_examples(pooling, sizes):
    model = net(pooling=pooling, **sizes)
    # Each modality is lacking once: its learned token has a gradient, too.
    batch = batch_of(9, 4, 6) | {"image_mask": torch.arange(3) != 2}
    single = loop_gradients(model, mean_loss, batch)
    found = per_example_gradients(model, mean_loss, batch)
    assert difference(found, single) <= SINGLE * norm(single)
    with in_double():
        expected = assert_gradients(
            model.double(), mean_loss, to_dtype(batch, torch.float64), DOUBLE
        )
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(value.any() for value in expected.values())


def mean_loss(model: PrivacyPreserveNet, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.losses(batch).mean()


def test_modalities_weigh_alike_however_many_tokens_they_have():
    model = net(pooling="modalities", **SUMMARY)
    batch = batch_of(9, 4)
    states = model.states(batch)
    assert model.prefix == 1 + 2
    assert states.shape[1] == 3 + 9
    image, sound = states[:, 0], states[:, 1:3].mean(dim=1)
    first = (image[0] + sound[0] + states[0, 3:12].mean(dim=0)) / 3
    # The second one has no sound, and four tokens of text.
    second = (image[1] + states[1, 3:7].mean(dim=0)) / 2
    expected = model.network.score(torch.stack([first, second]))
    torch.testing.assert_close(model(batch), expected)


def test_tokens_are_predicted_from_what_stands_before():
    model = net(task="causal_lm")
    batch = batch_of(9, 4, tokens=True)
    assert model(batch).shape == (2, 9, 259)
    together = model.losses(batch)
    torch.testing.assert_close(together[1:], model.losses(row_of(batch, 1, 4)))
    changed = batch | {"image": 3 * torch.randn_like(batch["image"])}
    assert (model.losses(changed) - together).abs().min() > 1e-7


def test_what_an_example_lacks_may_hold_anything():
    model = net()
    batch = batch_of(5, 5, 5)
    spoilt = batch | {"audio": batch["audio"].clone()}
    spoilt["audio"][1] = torch.nan
    torch.testing.assert_close(model(spoilt), model(batch))
    model.losses(spoilt).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_absent_sound_is_no_silence():
    model = net()
    torch.nn.init.normal_(model.encoders["audio"].absent)
    batch = batch_of(5, 5)
    present = batch | {"audio_mask": torch.ones(2, dtype=torch.bool)}
    assert (model(present)[1] - model(batch)[1]).abs().max() > 1e-4


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_large_decoder_keeps_what_is_trained_and_no_more(task):
    pytest.importorskip("peft")
    model = net(task=task, decoder=None, pretrained=LARGE)
    batch = batch_of(6, 3, tokens=task == "causal_lm")
    model.losses(batch).mean().backward()
    state = model.state_dict()
    assert set(state) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("encoders.") for name in state)
    assert any("lora" in name for name in state)
    assert not any("embed_tokens" in name for name in state)
    other = net(task=task, decoder=None, pretrained=LARGE)
    other.load_state_dict(state)
    torch.testing.assert_close(other.losses(batch), model.losses(batch))


def test_it_continues_a_text():
    model = net(task="causal_lm")
    batch = batch_of(5, 3)
    made = model.generate(batch, max_new_tokens=3)
    assert [len(row) for row in made] == [3, 3]
    assert made[1] == model.generate(row_of(batch, 1, 3), max_new_tokens=3)[0]
    stopped = model.generate(batch, max_new_tokens=3, end_id=made[0][0])
    assert stopped[0] == made[0][:1]
    with pytest.raises(ConfigurationError, match="task 'classification'"):
        net().generate(batch, 1)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"modalities": []}, r"modalities=\[\]"),
        ({"modalities": ["text", "text"]}, "'text', 'text'"),
        ({"modalities": ["image"], "task": "causal_lm"}, "causal_lm"),
        ({"pretrained": LARGE}, "Both"),
        ({"num_labels": 1}, "num_labels"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_a_model_that_could_not_be_meant_is_refused(settings, found):
    with pytest.raises(ConfigurationError, match=found):
        net(**settings)


def trainer_of(*callbacks: L.Callback, **settings) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def test_data_without_a_modality_are_refused():
    data = GlyphsAndTones(GlyphCorpus(n_users=4), modalities=["text", "image"])
    with pytest.raises(ConfigurationError, match="the model reads audio"):
        trainer_of(max_steps=1).fit(net(), datamodule=data)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"image": ImageSettings(channels=3)}, "image.channels` to 1"),
        ({"audio": AudioSettings(features=20)}, "audio.features` to 32"),
    ],
    ids=str,
)
def test_data_of_another_width_are_refused(settings, found):
    data = GlyphsAndTones(GlyphCorpus(n_users=4))
    with pytest.raises(ConfigurationError, match=found):
        trainer_of(max_steps=1).fit(net(**settings), datamodule=data)


@pytest.mark.parametrize(
    ("modalities", "settings"),
    [
        (["text", "image", "audio"], {}),
        (["image"], {}),
        (
            ["text", "image", "audio"],
            {
                "pooling": "modalities",
                "image": ImageSettings(hidden_size=8, layers=1, summary=1),
                "audio": AudioSettings(layers=0, summary=1),
            },
        ),
    ],
    ids=["all", "image", "summary"],
)
def test_it_trains_privately_with_every_check(modalities, settings):
    """The checks and guards of every release run here, on each kind of parameter."""
    data = GlyphsAndTones(
        GlyphCorpus(n_users=20, p_missing=0.3), batch_size=8, modalities=modalities
    )
    model = PrivacyPreserveNet(modalities=modalities, decoder=SMALL, **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    privacy = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-5, print_table=False)
    trainer_of(privacy, max_steps=2).fit(model, datamodule=data)
    assert 0 < privacy.epsilon() < 20
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_longer_texts_than_the_model_reads_are_refused_with_the_option_that_helps():
    model = PrivacyPreserveNet(decoder=SmallDecoder(num_layers=1, max_length=16))
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(max_length=1000))
    with pytest.raises(ConfigurationError, match=r"`model.decoder.max_length` to 1000"):
        model.setup("fit")
