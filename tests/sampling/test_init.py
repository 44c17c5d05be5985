from __future__ import annotations

import pytest

from lightning_privacy import sampling
from lightning_privacy.sampling.loader import PrivateLoader


def test_every_public_name_is_there():
    assert sampling.PrivateLoader is PrivateLoader
    for name in sampling.__all__:
        assert getattr(sampling, name).__doc__


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sampling.Nothing  # noqa: B018
