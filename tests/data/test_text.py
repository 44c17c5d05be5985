from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lightning_privacy.data import SecretsCorpus, TextCorpus, TextDataModule, TextFile
from lightning_privacy.errors import ConfigurationError

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"text number {i}", "user": f"user {i % 7}", "likes": i} for i in range(40)]
SHAKESPEARE = Path(__file__).parents[2].parent / "shared" / "data" / "shakespeare_users.jsonl"


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A home folder of the test's own, so that it can be searched for copies of the text."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    return home


def write(path: Path, rows: list[dict] = ROWS) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    name = path.name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".csv"):
        table = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(table))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_every_format_gives_the_same_documents(tmp_path, name, home):
    documents = TextFile(write(tmp_path / name)).documents()
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert [d.user for d in documents] == [row["user"] for row in ROWS]
    assert not list(home.rglob("*.arrow"))


def test_users_are_on_one_side_only(tmp_path):
    split = TextFile(write(tmp_path / "a.jsonl"), val_fraction=0.4).split()
    train, held_out = ({d.user for d in side} for side in (split.train, split.validation))
    assert train
    assert held_out
    assert not train & held_out
    assert len(split.train) + len(split.validation) == len(ROWS)


def test_one_user_less_moves_nobody_else(tmp_path):
    everyone = TextFile(write(tmp_path / "a.jsonl"), val_fraction=0.4).split()
    fewer = [row for row in ROWS if row["user"] != "user 3"]
    rest = TextFile(write(tmp_path / "b.jsonl", fewer), val_fraction=0.4).split()
    assert {d.user for d in rest.train} == {d.user for d in everyone.train} - {"user 3"}


def test_the_share_held_out_is_about_right_and_follows_the_seed(tmp_path):
    rows = [{"text": "t", "user": str(i)} for i in range(4000)]
    path = write(tmp_path / "a.jsonl", rows)
    held_out = {d.user for d in TextFile(path, val_fraction=0.25).split().validation}
    assert 900 < len(held_out) < 1100
    other = {d.user for d in TextFile(path, val_fraction=0.25, seed=1).split().validation}
    assert held_out != other


def test_users_may_be_numbers(tmp_path):
    documents = TextFile(write(tmp_path / "a.jsonl"), user_column="likes").documents()
    assert documents[12].user == "12"


def test_without_a_user_column_every_row_is_its_own_user(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "same"}, {"text": "same"}, {"text": "other"}])
    documents = TextFile(path, user_column=None).documents()
    assert len({d.user for d in documents}) == 2  # equal texts stay on one side of the split


def test_the_data_module_reads_the_file(tmp_path):
    data = TextDataModule(write(tmp_path / "a.jsonl"), val_fraction=0.4, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[0] == 8
    assert data.tokenizer.decode(batch["input_ids"][0].tolist()).startswith("text number")


def test_the_corpus_switches_on_its_path(tmp_path):
    embedded = TextCorpus(embedded=SecretsCorpus(n_users=20))
    assert any("door code" in document.text for document in embedded.split().train)
    own = TextCorpus(write(tmp_path / "a.jsonl"), val_fraction=0.4)
    assert all(document.text.startswith("text number") for document in own.split().train)


NO_TEXT = [{"text": "a", "user": "b"}, {"text": None, "user": "b"}]
NO_USER = [{"text": "a", "user": "b"}, {"text": "a", "user": None}]
BAD = {
    "missing": lambda folder: TextFile(str(folder / "none.jsonl")),
    "folder": lambda folder: TextFile(str(folder)),
    "ending": lambda folder: TextFile(write_raw(folder / "a.docx", "x")),
    "empty": lambda folder: TextFile(write_raw(folder / "a.jsonl", "")),
    "no rows": lambda folder: TextFile(write_raw(folder / "a.csv", "text,user\n")),
    "not json": lambda folder: TextFile(write_raw(folder / "a.jsonl", "this is no json\n")),
    "text column": lambda folder: TextFile(write(folder / "a.jsonl"), text_column="body"),
    "user column": lambda folder: TextFile(write(folder / "a.jsonl"), user_column="author"),
    "text type": lambda folder: TextFile(write(folder / "a.jsonl"), text_column="likes"),
    "text null": lambda folder: TextFile(write(folder / "a.jsonl", NO_TEXT)),
    "user null": lambda folder: TextFile(write(folder / "a.jsonl", NO_USER)),
    "user list": lambda folder: TextFile(write(folder / "a.jsonl", [{"text": "a", "user": ["b"]}])),
}


def write_raw(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "There is no file"),
        ("folder", "There is no file"),
        ("ending", r"ends in '\.docx'"),
        ("empty", "is empty"),
        ("no rows", "is empty"),
        ("not json", "cannot be read"),
        ("text column", "no column 'body'; it has likes, text, user"),
        ("user column", "no column 'author'.*\n.*\n.*or null"),
        ("text type", r"Row 1 of .* holds a int \('0'\)"),
        ("text null", "Row 2 of .* holds nothing"),
        ("user null", "Row 2 of .* holds nothing"),
        ("user list", "Row 1 of .* holds a list"),
    ],
)
def test_a_bad_file_gets_one_clear_error(tmp_path, case, message):
    with pytest.raises(ConfigurationError, match=message):
        BAD[case](tmp_path).documents()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigurationError, match="val_fraction"):
        TextFile("a.jsonl", val_fraction=share)


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="the development data are not here")
def test_a_real_file():
    split = TextFile(str(SHAKESPEARE)).split()
    assert len(split.train) + len(split.validation) == 7097
    assert len({d.user for d in (*split.train, *split.validation)}) == 299
