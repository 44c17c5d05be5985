from __future__ import annotations

import os

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of the test's own, from which a command leaves no settings behind."""
    before = set(os.environ)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(os.environ) - before:
        if name.startswith("PL_"):
            del os.environ[name]
