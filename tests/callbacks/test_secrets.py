"""The seeds of draws and noise stay in the process: byte by byte, in every artefact of a run."""

from __future__ import annotations

import base64
import io
import logging
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_privacy import GuaranteeError, PrivacyLedger
from tests.callbacks.test_resume import KEY, saving
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

NOISE = [*LIGHTNING_NOISE, "ignore:Checkpoint directory .* exists and is not empty"]
pytestmark = [pytest.mark.filterwarnings(text) for text in NOISE]
WINDOW = 8
"""As many bytes of a key in a row are no accident: 2**-64 for each place."""


def written(key: bytes) -> Iterator[bytes]:
    """A key, or eight bytes of it, in the ways in which it may come to be written."""
    for start in range(len(key) - WINDOW + 1):
        part = key[start : start + WINDOW]
        yield part
        yield part[::-1]
        yield part.hex().encode()
        yield part.hex().upper().encode()
        yield part.hex(" ").encode()
        yield repr(part)[2:-1].encode()
        yield str(list(part))[1:-1].encode()
        yield ",".join(map(str, part)).encode()
        for order in ("big", "little"):
            yield str(int.from_bytes(part, order)).encode()
    for order in ("big", "little"):
        number = int.from_bytes(key, order)
        yield str(number).encode()
        yield f"{number:x}".encode()
    for shift in range(3):
        # Whatever stands before it, base64 comes in threes of bytes.
        part = key[shift:]
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(part[: len(part) // 3 * 3])
            yield encode(part[:12])
        yield base64.b32encode(part[:15])
        yield base64.b85encode(part[:12])


def contents(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, and every member of every archive."""
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield path.name, data
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path.name}/{name}", archive.read(name)


def leaks(key: bytes, artefacts: dict[str, bytes]) -> list[str]:
    return [
        name for name, data in artefacts.items() if any(text in data for text in set(written(key)))
    ]


class Keys(pl.Callback):
    """Remembers what the run keeps secret, and what it shows of itself while it runs."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.shown = ""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        (callback,) = (c for c in trainer.callbacks if c.state_key == KEY)
        run = callback._run
        noise, sampler = run.step._noise, run.loader._batches.sampler
        self.keys = {
            "secret": callback._secret,
            "noise": noise._secret,
            "draws": sampler._secret,
        }
        parts = (trainer, callback, callback._state, run, run.loader, sampler, noise, run.step)
        self.shown += "\n".join(map(repr, parts))


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Keys]:
    directory = tmp_path_factory.mktemp("run")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    keys = Keys()
    ledger = PrivacyLedger(directory / "ledger.sqlite", dataset="d", budget=(90.0, 1e-4))
    callback = privacy(test_seed=None, ledger=ledger, print_table=True)
    try:
        trainer(
            directory,
            callback,
            keys,
            saving(directory / "checkpoints", 3),
            logger=CSVLogger(directory),
            log_every_n_steps=1,
        ).fit(Regression(), loader())
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
    found = dict(contents(directory))
    found["the log"] = stream.getvalue().encode()
    found["what objects show"] = keys.shown.encode()
    found["the summary"] = repr(callback.summary()).encode()
    return found, keys


def test_no_artefact_holds_a_key(artefacts: tuple[dict[str, bytes], Keys]) -> None:
    found, keys = artefacts
    assert len(keys.keys["secret"]) == 32
    assert {"step=9.ckpt", "ledger.sqlite", "metrics.csv"} <= found.keys()
    assert any(name.endswith("data.pkl") for name in found)
    assert any(name.startswith("privacy-journal") for name in found)
    for name, key in keys.keys.items():
        assert leaks(key, found) == [], name


def test_the_key_of_the_seal_is_in_none_either(artefacts: tuple[dict[str, bytes], Keys]) -> None:
    from lightning_privacy.callbacks._seal import _key

    key = _key(make=False)
    assert key is not None
    assert leaks(key, artefacts[0]) == []


def test_a_key_would_be_found_in_whatever_way_it_was_written(
    artefacts: tuple[dict[str, bytes], Keys],
) -> None:
    key = artefacts[1].keys["secret"]
    for text in set(written(key)):
        assert leaks(key, {"planted": b"before " + text + b" after"}) == ["planted"]
    assert leaks(key, {"base64": base64.b64encode(b"a" + key), "half": key[8:24]}) == [
        "base64",
        "half",
    ]


def test_checkpoints_are_tensors_and_plain_values(
    artefacts: tuple[dict[str, bytes], Keys], tmp_path: Path
) -> None:
    for name, data in artefacts[0].items():
        if name.endswith(".ckpt"):
            state = torch.load(io.BytesIO(data), weights_only=True)
            assert state["callbacks"][KEY]
        if name.endswith("data.pkl"):
            named = {
                str(argument)
                for operation, argument, _ in pickletools.genops(data)
                if operation.name in {"GLOBAL", "STACK_GLOBAL", "INST"} and argument
            }
            assert not [text for text in named if text.startswith("lightning_privacy")]


def test_what_knows_a_secret_cannot_be_pickled(tmp_path: Path) -> None:
    import copy
    import pickle

    class Trying(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            (callback,) = (c for c in trainer.callbacks if c.state_key == KEY)
            for attempt in (pickle.dumps, copy.deepcopy):
                with pytest.raises(GuaranteeError, match="secret"):
                    attempt(callback._run.step._noise)

    trainer(tmp_path, privacy(test_seed=None), Trying(), max_steps=1).fit(Regression(), loader())
