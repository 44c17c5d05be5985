"""ε as people read it: rounded up, never to the nearest."""

from __future__ import annotations

import decimal
import math


def shown_epsilon(epsilon: float, digits: int = 4) -> str:
    """``epsilon`` with ``digits`` significant digits, at least as large as it is.

    Args:
        epsilon: ε >= 0, possibly infinite.
        digits: Significant digits, >= 1.

    Returns:
        A decimal number whose value is not below ``epsilon``; ``"inf"`` for infinity.
    """
    if not math.isfinite(epsilon):
        return str(epsilon)
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return f"{context.create_decimal_from_float(epsilon).normalize(context):f}"
