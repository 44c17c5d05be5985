"""A keyed digest over the callback's state in a checkpoint, so that an edited one is noticed.

The key never lies beside the checkpoints: it is a file of the user who trains, and whoever can
write checkpoints but cannot read that file cannot lower what they charge. The digest is
HMAC-SHA256 (RFC 2104) over the state as JSON.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from lightning_privacy.accounting.journal import flush_directory
from lightning_privacy.errors import ConfigurationError, GuaranteeError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "LIGHTNING_PRIVACY_STATE"
"""Environment variable: another directory for the key."""

_FIELD, _KEY_BYTES = "seal", 32


class Seal:
    """Seals what goes into a checkpoint, and verifies what comes out of one.

    Guarantee: a state that `verify` accepts without ``trust`` was returned by `sealed` under the
    same key, unless somebody who can read the key made it, or HMAC-SHA256 is broken. A state of
    deterministic test mode has no seal: its ε is infinite.

    Args:
        trust: Whether to accept a state that was sealed with another key, or not at all. One that
            was sealed with this key and changed afterwards is refused all the same.
    """

    def __init__(self, *, trust: bool) -> None:
        self._trust = trust

    def prepare(self) -> None:
        """Make the key if there is none yet, so that no checkpoint fails for want of it.

        Raises:
            ConfigurationError: There is no place for the key, or others can read it.
        """
        _key(make=True)

    def sealed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Add the digest.

        Args:
            state: Plain values; empty before anything was planned.

        Returns:
            A copy with one more entry.

        Raises:
            ConfigurationError: There is no place for the key, or others can read it.
        """
        if not state or _is_test(state) or _rank():
            return dict(state)
        key = _key(make=True)
        assert key is not None
        return {**state, _FIELD: {"key": _name(key), "digest": _digest(key, state)}}

    def verify(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that is not as it was written.

        Args:
            state: What a checkpoint holds.

        Raises:
            GuaranteeError: It was changed, or its key is not here and nobody vouches for it.
        """
        if not state or _is_test(state) or _rank():
            return
        key, found = _key(make=False), state.get(_FIELD)
        known = isinstance(found, dict) and key is not None and found.get("key") == _name(key)
        if known and isinstance(found, dict) and key is not None:
            rest = {name: value for name, value in state.items() if name != _FIELD}
            if hmac.compare_digest(_digest(key, rest), str(found.get("digest"))):
                return
            raise _refused(
                "a digest that does not fit the rest of the state: somebody changed it",
                "resume from a checkpoint that nobody edited",
            )
        if self._trust:
            return
        sealed = "another key than this user's" if isinstance(found, dict) else "no key"
        raise _refused(
            f"a state sealed with {sealed}",
            f"copy the key of the machine that wrote it to {_place()}; or, if you know that nobody "
            "edited the checkpoint, pass DifferentialPrivacy(trust_checkpoint=True)",
        )


def _rank() -> int:
    # The first process writes the checkpoint, and its refusal ends all of them; others may run on
    # machines that have no key.
    return int(getattr(rank_zero_only, "rank", 0))


def _is_test(state: Mapping[str, Any]) -> bool:
    # A real run refuses to go on from such a state, so that this is no way around the seal.
    plan = state.get("plan")
    return isinstance(plan, dict) and plan.get("deterministic") is True


def _digest(key: bytes, state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _name(key: bytes) -> str:
    """Tells keys apart and tells nothing about them."""
    return hmac.new(key, b"name of the key", hashlib.sha256).hexdigest()[:16]


def _place() -> Path:
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen) / "checkpoint.key"
    try:
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise _no_place("a user without a home directory") from error
    return Path(home) / "lightning_privacy" / "checkpoint.key"


def _key(*, make: bool) -> bytes | None:
    path = _place()
    try:
        if not path.exists():
            if not make:
                return None
            _write(path)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigurationError(
                must="only the user who trains can read the key that seals checkpoints",
                found=f"{path} with mode {path.stat().st_mode & 0o777:o}",
                cost="a spent budget that others could lower in a checkpoint, unnoticed",
                remedy=f"chmod 600 {path}",
            )
        key = path.read_bytes()
    except OSError as error:
        raise _no_place(f"{path}: {error}") from error
    if len(key) != _KEY_BYTES:
        raise _no_place(f"{len(key)} bytes in {path}, where {_KEY_BYTES} were written")
    return key


def _write(path: Path) -> None:
    """Whole or not at all, and the first of several processes wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        Path(path).hardlink_to(name)
        flush_directory(path.parent)
    except FileExistsError:
        pass
    finally:
        Path(name).unlink()


def _no_place(found: str) -> ConfigurationError:
    return ConfigurationError(
        must="the key that seals checkpoints is kept in a directory of the user",
        found=found,
        cost="checkpoints whose spent budget anybody could lower, unnoticed",
        remedy=f"set the environment variable {VARIABLE} to a directory that this user alone can "
        "read and that outlives the job, not the one with the checkpoints",
    )


def _refused(found: str, remedy: str) -> GuaranteeError:
    return GuaranteeError(
        must="the privacy state of a checkpoint is as it was written",
        found=found,
        cost="spent budget that was taken out, or a mechanism that did not run",
        remedy=remedy,
    )
