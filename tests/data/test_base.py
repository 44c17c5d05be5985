from __future__ import annotations

import pickle

import pytest
import torch

from lightning_privacy.data import (
    ByteTokenizer,
    Document,
    PadOnTheRight,
    SecretsCorpus,
    SyntheticSecrets,
    TokenisedDocuments,
)
from lightning_privacy.data.base import CausalTextDataModule, Split
from lightning_privacy.errors import ConfigurationError


class Given(CausalTextDataModule):
    """Two given sides."""

    def __init__(self, train: list[str], validation: list[str], **settings) -> None:
        defaults = {
            "batch_size": 2,
            "max_length": 16,
            "padding": "longest",
            "tokenizer": "byte",
            "num_workers": 0,
        }
        super().__init__(**{**defaults, **settings})
        self.sides = Split(
            train=tuple(Document("a", text) for text in train),
            validation=tuple(Document("b", text) for text in validation),
        )

    def split(self) -> Split:
        return self.sides


def test_a_batch_is_padded_on_the_right_to_its_longest_row():
    rows = TokenisedDocuments(
        [Document("a", "xy"), Document("b", "x")], ByteTokenizer(), max_length=8
    )
    batch = PadOnTheRight(pad_id=258)([rows[0], rows[1]])
    x, y = ord("x"), ord("y")
    assert batch["input_ids"].tolist() == [[256, x, y, 257], [256, x, 257, 258]]
    assert batch["labels"].tolist() == [[256, x, y, 257], [256, x, 257, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_a_batch_can_have_a_fixed_width():
    data = Given(["a", "bb"], ["c"], padding="max_length")
    assert {b["input_ids"].shape[1] for b in data.train_dataloader()} == {16}
    assert {b["input_ids"].shape[1] for b in data.val_dataloader()} == {16}


def test_rows_are_cut_at_the_longest_length():
    data = Given(["a" * 100], ["b"])
    assert len(data.train_dataloader().dataset[0]["input_ids"]) == 16


def test_the_training_users_stand_in_the_order_of_the_data_set():
    data = SyntheticSecrets(SecretsCorpus(n_users=12))
    dataset = data.train_dataloader().dataset
    assert data.users == dataset.users
    assert len(dataset) == len(data.users)
    for row, user in zip(dataset, data.users, strict=True):
        assert user in data.tokenizer.decode(row["input_ids"].tolist())


def test_every_loader_exists_before_and_after_setup():
    data = Given(["a", "b", "c"], ["d"])
    assert len(data.train_dataloader()) == 2
    data.setup("fit")
    documents = data.train_documents
    data.setup("validate")
    assert data.train_documents is documents
    assert len(data.test_dataloader()) == len(data.predict_dataloader()) == 1


def test_workers_can_load():
    data = Given(["a", "b", "c"], ["d"], num_workers=1)
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 3


def test_the_collation_survives_pickling():
    collate = PadOnTheRight(pad_id=3, length=7)
    assert pickle.loads(pickle.dumps(collate)) == collate


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"num_workers": -1}, "num_workers"),
        ({"padding": "left"}, "padding"),
        ({"tokenizer": "no/such/folder"}, "tokenizer"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        Given(["a"], ["b"], **settings)


@pytest.mark.parametrize(("train", "validation"), [([], ["a"]), (["a"], [])])
def test_an_empty_side_is_refused(train, validation):
    with pytest.raises(ConfigurationError, match="at least one user"):
        Given(train, validation).setup("fit")
