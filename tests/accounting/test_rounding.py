from __future__ import annotations

import pytest

from lightning_privacy.accounting.rounding import shown_epsilon


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [
        (0.0, "0"),
        (8.0, "8"),
        (1.69001, "1.691"),
        (7.99991, "8"),
        (123456.7, "123500"),
        (0.000012341, "0.00001235"),
        (float("inf"), "inf"),
    ],
)
def test_rounded_up(epsilon: float, shown: str) -> None:
    assert shown_epsilon(epsilon) == shown


def test_never_below() -> None:
    for i in range(1, 3000):
        epsilon = i * 0.0037912
        assert float(shown_epsilon(epsilon)) >= epsilon
