from __future__ import annotations

import json

import pytest
import torch

from lightning_privacy.data import (
    ClassificationDataModule,
    Document,
    InstructionDataModule,
    LabelledDocuments,
    PadOnTheRight,
    TokenisedDocuments,
)
from lightning_privacy.data.tokenizers import ByteTokenizer
from lightning_privacy.errors import ConfigurationError

datasets = pytest.importorskip("datasets")

ROWS = [
    {"ask": f"what is {i}", "say": f"it is {i}", "who": f"user {i % 6}", "class": i % 2}
    for i in range(30)
]
TEMPLATES = {"text_template": "{say}", "prompt_template": "Q: {ask}\nA: "}
BEGIN, END, PAD = ByteTokenizer.begin_id, ByteTokenizer.end_id, ByteTokenizer.pad_id


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def instructions(path, **settings):
    settings = {"val_fraction": 0.4, "tokenizer": "byte", **TEMPLATES, **settings}
    return InstructionDataModule(path, **settings)


def classes(path, **settings):
    given = {"text_column": "say", "label_column": "class", "user_column": "who", "seed": 1}
    given |= {"val_fraction": 0.4, "tokenizer": "byte", "labels": ["0", "1"]}
    return ClassificationDataModule(path, **{**given, **settings})


# ---------------------------------------------------------------------- rows
def test_the_prompt_is_given_and_not_learnt():
    (row,) = TokenisedDocuments([Document("a", "xy", prompt="p:")], ByteTokenizer(), 16)
    ids = [BEGIN, *b"p:xy", END]
    assert row["input_ids"].tolist() == ids
    assert row["labels"].tolist() == [-100] * 3 + ids[3:]


@pytest.mark.parametrize(
    ("prompt", "text", "kept"),
    [
        ("abcdefgh", "xy", [BEGIN, *b"defgh", *b"xy"]),  # of the prompt its end
        ("ab", "stuvwxyz", [BEGIN, *b"ab", *b"stuvw"]),
        ("abcdefgh", "stuvwxyz", [BEGIN, *b"fgh", *b"stuv"]),  # each gets a half
        ("", "stuvwxyz", [BEGIN, *b"stuvwxy"]),
    ],
)
def test_what_is_too_long_is_cut(prompt, text, kept):
    (row,) = TokenisedDocuments([Document("a", text, prompt=prompt)], ByteTokenizer(), 8)
    if len(text) == 2:  # with the mark of its end
        kept = [BEGIN, *prompt.encode()[-4:], *text.encode(), END]
    assert row["input_ids"].tolist() == kept
    assert (row["labels"] != -100).any()


def test_a_batch_of_classes():
    rows = LabelledDocuments(
        [Document("a", "xy", label=1), Document("b", "x", label=0)], ByteTokenizer(), 8
    )
    batch = PadOnTheRight(PAD)([rows[0], rows[1]])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[BEGIN, *b"xy", END], [BEGIN, *b"x", END, PAD]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 3]


# ---------------------------------------------------------------------- instructions
def test_templates_are_filled_with_columns(file):
    data = instructions(file, user_column="who")
    split = data.split()
    assert {d.user for d in split.train} & {d.user for d in split.validation} == set()
    document = split.train[0]
    number = document.text.removeprefix("it is ")
    assert document.prompt == f"Q: what is {number}\nA: "
    assert document.user == f"user {int(number) % 6}"
    row = next(iter(data.train_dataloader().dataset))
    assert data.tokenizer.decode(row["labels"].clamp(min=0).tolist()).endswith(document.text)


def test_without_a_prompt_everything_is_learnt(file):
    data = instructions(file, prompt_template=None)
    row = data.train_dataloader().dataset[0]
    assert torch.equal(row["labels"], row["input_ids"])


def test_without_a_user_column_a_row_is_its_own_user(file):
    data = instructions(file)
    assert len(set(data.users)) == len(data.users)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"text_template": "text"}, "text_template"),
        ({"text_template": "{"}, "text_template"),
        ({"prompt_template": "{question}"}, "no column 'question'"),
        ({"text_template": "{class}"}, "is a string"),
        ({"user_column": "author"}, "user_column"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"tokenizer": None}, "tokenizer"),
    ],
)
def test_wrong_arguments_are_refused_by_name(file, settings, named):
    with pytest.raises(ConfigurationError, match=named):
        instructions(file, **settings).setup()


# ---------------------------------------------------------------------- classes
def test_a_class_is_its_place_in_the_list(file):
    assert classes(file).num_labels == 2
    for labels in (["0", "1"], ["1", "0"]):
        split = classes(file, labels=labels).split()
        for document in (*split.train, *split.validation):
            own = str(int(document.text.removeprefix("it is ")) % 2)
            assert labels[document.label] == own
    batch = next(iter(classes(file).train_dataloader()))
    assert batch["labels"].dim() == 1


def test_rows_without_a_class_are_refused_or_dropped(tmp_path):
    rows = [{**row, "class": None if i < 5 else row["class"]} for i, row in enumerate(ROWS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigurationError, match="drop_unlabelled"):
        classes(str(path)).split()
    split = classes(str(path), drop_unlabelled=True).split()
    assert len(split.train) + len(split.validation) == len(ROWS) - 5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"labels": ["0"]}, "at least two"),
        ({"labels": ["0", "0"]}, "different"),
        ({"labels": ["0", "2"]}, "Add it to `labels`"),
        ({"label_column": "stars"}, "label_column"),
    ],
)
def test_wrong_classes_are_refused(file, settings, named):
    with pytest.raises(ConfigurationError, match=named):
        classes(file, **settings).split()


# ---------------------------------------------------------------------- the hub
def test_a_data_set_of_the_hub_is_read_by_its_name(file, tmp_path, monkeypatch):
    # What `datasets` reads by name it also reads from a folder; the hub itself is not asked here.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = instructions(f"hub:{tmp_path}", user_column="who")
    assert data.split() == instructions(file, user_column="who").split()
    for path, named in ((f"hub:{tmp_path}:no", "split 'no'"), ("hub:a/b/c", "hub:owner/name")):
        with pytest.raises(ConfigurationError, match=named):
            instructions(path).split()
