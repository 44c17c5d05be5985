"""An edited checkpoint is noticed; the key stays with the user; another machine is a choice."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_privacy import ConfigurationError, GuaranteeError
from lightning_privacy.callbacks._seal import Seal
from tests.callbacks.test_resume import KEY, saving
from tests.callbacks.training import LIGHTNING_NOISE, Regression, loader, privacy, trainer

NOISE = [*LIGHTNING_NOISE, "ignore:Checkpoint directory .* exists and is not empty"]
pytestmark = [pytest.mark.filterwarnings(text) for text in NOISE]
STATE = {"plan": {"deterministic": False, "delta": 1e-5}, "ledger": {"releases": [{"count": 7}]}}
EDITED = {**STATE, "ledger": {"releases": [{"count": 6}]}}
EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "fewer releases": lambda s: s["ledger"]["releases"][0].update(count=1),
    "more noise": lambda s: s["ledger"]["releases"][0].update(noise_multiplier=9.0),
    "no releases": lambda s: s["ledger"].update(releases=[]),
    "another plan": lambda s: s["plan"].update(noise_multiplier=9.0),
    "another rate": lambda s: s["plan"].update(sample_rate=0.01),
    "another run": lambda s: s.update(run="0" * 16, journal=None),
    "no journal": lambda s: s.update(journal=None),
    "an earlier draw": lambda s: s.update(cursor=0),
    "no seal": lambda s: s.pop("seal"),
    "a seal of nothing": lambda s: s.update(seal=None),
    "another digest": lambda s: s["seal"].update(digest="0" * 64),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_PRIVACY_STATE", str(tmp_path / "home"))
    return tmp_path / "home" / "checkpoint.key"


def checkpoint_of(directory: Path) -> Path:
    trainer(directory, privacy(test_seed=None), saving(directory), max_steps=7).fit(
        Regression(), loader()
    )
    return directory / "step=7.ckpt"


def resumed(path: Path, **settings: Any) -> Any:
    callback = privacy(test_seed=None, **settings)
    trainer(path.parent, callback).fit(Regression(), loader(), ckpt_path=str(path))
    return callback


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint["callbacks"][KEY])
    torch.save(checkpoint, path)
    return path


# ---------------------------------------------------------------------- the seal by itself
def test_what_was_sealed_is_accepted_and_what_was_changed_is_not(home: Path) -> None:
    seal = Seal(trust=False)
    sealed = seal.sealed(STATE)
    seal.verify(sealed)
    for trust in (False, True):
        with pytest.raises(GuaranteeError, match="somebody changed it"):
            Seal(trust=trust).verify({**EDITED, "seal": sealed["seal"]})


def test_the_key_is_made_once_and_for_its_owner_alone(home: Path) -> None:
    assert not home.exists()
    first = Seal(trust=False).sealed(STATE)
    key = home.read_bytes()
    assert len(key) == 32
    assert stat.S_IMODE(home.stat().st_mode) == 0o600
    assert Seal(trust=False).sealed(STATE) == first
    assert home.read_bytes() == key
    assert list(home.parent.iterdir()) == [home]
    assert key.hex() not in repr(first)


def test_a_key_that_others_can_read_is_refused(home: Path) -> None:
    Seal(trust=False).prepare()
    home.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Seal(trust=False).prepare()


def test_half_a_key_is_refused(home: Path) -> None:
    home.parent.mkdir()
    home.write_bytes(b"short")
    home.chmod(0o600)
    with pytest.raises(ConfigurationError, match="5 bytes"):
        Seal(trust=False).prepare()


def test_no_place_for_a_key_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_PRIVACY_STATE", str(tmp_path / "file" / "below"))
    module = Regression()
    with pytest.raises(ConfigurationError, match="LIGHTNING_PRIVACY_STATE"):
        trainer(tmp_path, privacy(test_seed=None), saving(tmp_path)).fit(module, loader())
    assert not module.net[0].weight.grad
    # Without checkpoints there is nothing to seal.
    trainer(tmp_path, privacy(test_seed=None)).fit(Regression(), loader())


def test_the_usual_place_is_the_state_directory_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIGHTNING_PRIVACY_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    Seal(trust=False).prepare()
    assert (tmp_path / "lightning_privacy" / "checkpoint.key").is_file()


def test_test_mode_needs_no_key(home: Path) -> None:
    state = {**STATE, "plan": {"deterministic": True}}
    seal = Seal(trust=False)
    assert seal.sealed(state) == state
    seal.verify(state)
    assert seal.sealed({}) == {}
    assert not home.exists()


# ---------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_checkpoint_is_refused(tmp_path: Path, edit: str) -> None:
    path = edited(checkpoint_of(tmp_path), EDITS[edit])
    with pytest.raises(GuaranteeError, match="is as it was written"):
        resumed(path)


def test_a_real_run_does_not_go_on_from_a_state_declared_a_test(tmp_path: Path) -> None:
    path = edited(checkpoint_of(tmp_path), lambda s: s["plan"].update(deterministic=True))
    with pytest.raises(GuaranteeError, match="deterministic True there, False here"):
        resumed(path)


def test_another_machine_is_trusted_only_if_somebody_says_so(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_of(tmp_path)
    monkeypatch.setenv("LIGHTNING_PRIVACY_STATE", str(tmp_path / "another home"))
    for _ in range(2):
        with pytest.raises(GuaranteeError, match="another key than this user's") as caught:
            resumed(path)
        assert "trust_checkpoint=True" in caught.value.remedy
        Seal(trust=False).prepare()  # with a key of its own it is the same
    assert resumed(path, trust_checkpoint=True).steps == 10
    # With the key itself nothing has to be trusted.
    (tmp_path / "third home").mkdir()
    home.rename(tmp_path / "third home" / "checkpoint.key")
    monkeypatch.setenv("LIGHTNING_PRIVACY_STATE", str(tmp_path / "third home"))
    with pytest.warns(UserWarning, match="3 private steps since"):
        assert resumed(path).steps == 10 + 3


def test_a_trusted_checkpoint_is_sealed_anew(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_of(tmp_path)
    monkeypatch.setenv("LIGHTNING_PRIVACY_STATE", str(tmp_path / "another home"))
    callback = privacy(test_seed=None, trust_checkpoint=True)
    trainer(tmp_path, callback, saving(tmp_path, 9)).fit(
        Regression(), loader(), ckpt_path=str(path)
    )
    with pytest.warns(UserWarning, match="1 private steps since"):
        resumed(tmp_path / "step=9.ckpt")
