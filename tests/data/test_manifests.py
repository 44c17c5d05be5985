"""A user's own examples, from a manifest, a folder by class and a saved data set."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_privacy.data import MultimodalFiles
from lightning_privacy.errors import ConfigurationError

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")


def files(folder, name):
    wave = 0.5 * np.sin(np.arange(1600) / 4)
    soundfile.write(folder / f"{name}.wav", wave, 8000)
    Image.fromarray(np.full((10, 10, 3), 200, dtype=np.uint8)).save(folder / f"{name}.png")


def manifest(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("name", "found"), [("no.jsonl", "no such file"), ("empty", "none of")])
def test_a_place_that_holds_nothing_is_told_from_one_that_is_not_there(name, found, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=found):
        MultimodalFiles(str(tmp_path / name), labels=["a", "b"]).setup()


def test_a_manifest_names_files_and_leaves_out_what_there_is_not(tmp_path):
    files(tmp_path, "a")
    rows = [{"text": f"t{i}", "label": "no", "image": "a.png", "user": f"u{i}"} for i in range(9)]
    rows += [{"text": "s", "label": "yes", "audio": "a.wav", "user": f"u{i}"} for i in range(9)]
    data = MultimodalFiles(
        manifest(tmp_path, rows), labels=["no", "yes"], user_column="user", val_fraction=0.4
    )
    data.setup()
    sides = [data.dataset("train"), data.dataset("validation")]
    assert len(sides[0]) + len(sides[1]) == 18
    assert not set(sides[0].users) & set(sides[1].users)
    assert data.num_labels == 2
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        assert (batch["image_mask"] == ~batch["audio_mask"]).all()
        assert (batch["audio_mask"] == batch["labels"].bool()).all()
        shown = batch["image"][batch["image_mask"]]
        np.testing.assert_allclose(shown, (200 / 255 - 0.5) / 0.5, atol=1e-5)
        assert batch["audio"][batch["audio_mask"]].flatten(1).std(1).min() > 0.1


def test_a_folder_for_each_class(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for name in range(8):
            files(tmp_path / label, name)
            (tmp_path / label / f"{name}.txt").write_text(f"{name}")
    data = MultimodalFiles(str(tmp_path), labels=["cat", "dog"], val_fraction=0.3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image_mask"].all()
    assert batch["audio_mask"].all()
    assert set(batch["labels"].tolist()) == {0, 1}


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    (tmp_path / "own" / "cat").mkdir(parents=True)
    for name in range(8):
        files(tmp_path / "own" / "cat", name)
    monkeypatch.chdir(tmp_path)
    data = MultimodalFiles("own", labels=["cat"], modalities=["image", "audio"], val_fraction=0.3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image_mask"].all()
    assert batch["audio_mask"].all()


def test_a_key_that_no_example_has_is_said(tmp_path):
    rows = [{"caption": "a", "label": "no"} for _ in range(30)]
    data = MultimodalFiles(
        manifest(tmp_path, rows), labels=["no"], modalities=["text"], val_fraction=0.3
    )
    with pytest.warns(UserWarning, match=r"there are caption, label.*data\.text_column"):
        data.setup()


def test_what_is_not_read_need_not_be_there(tmp_path):
    rows = [{"text": "a", "label": "no", "image": "gone.png"} for _ in range(30)]
    data = MultimodalFiles(
        manifest(tmp_path, rows), labels=["no"], modalities=["text"], val_fraction=0.3
    )
    assert "image" not in next(iter(data.train_dataloader()))


def test_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    wave = np.sin(np.arange(1600) / 4).tolist()
    rows = [
        {"said": f"t{i}", "kind": "ab"[i % 2], "sound": {"array": wave, "sampling_rate": 8000}}
        for i in range(20)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    data = MultimodalFiles(
        str(tmp_path / "saved"), labels=["a", "b"], text_column="said", label_column="kind",
        audio_column="sound", modalities=["text", "audio"], val_fraction=0.3,
    )  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    assert batch["audio_mask"].all()
    assert "image" not in batch


def test_a_continuation_is_learnt_and_the_text_is_given(tmp_path):
    rows = [{"text": "ab", "label": " cd", "user": str(i)} for i in range(20)]
    data = MultimodalFiles(
        manifest(tmp_path, rows), task="causal_lm", modalities=["text"], val_fraction=0.3,
        max_length=8, padding="max_length",
    )  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] == 8
    kept = batch["labels"][0]
    assert (kept[:3] == -100).all()
    assert bytes(kept[3:5].tolist()) == b"cd"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"label": "maybe"}, "'maybe'"),
        ({"label": "no", "image": "none.png"}, "none.png"),
        ({"label": "no", "audio": "none.wav"}, "none.wav': there is no such file"),
        ({"label": "no", "image": "manifest.jsonl"}, "Pillow cannot"),
        ({"label": "no", "audio": "manifest.jsonl"}, "soundfile cannot"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(row, found, tmp_path):
    rows = [{"text": "a", "image": "", "audio": "", **row}] * 30
    data = MultimodalFiles(manifest(tmp_path, rows), labels=["no"], val_fraction=0.3)
    with pytest.raises(ConfigurationError, match=found):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("row", [{}, {"user": ""}, {"user": None}], ids=str)
def test_an_example_without_a_user_is_refused(row, tmp_path):
    rows = [{"text": "a", "label": "no", **row}] * 30
    data = MultimodalFiles(
        manifest(tmp_path, rows), labels=["no"], modalities=["text"], user_column="user"
    )
    with pytest.raises(ConfigurationError, match="none under 'user', but the keys text, label"):
        data.setup()


def test_a_place_with_nothing_in_it_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no `labels`|No `labels`"):
        MultimodalFiles(str(tmp_path))
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigurationError, match="none of these"):
            MultimodalFiles(str(path), labels=["a"]).setup()
