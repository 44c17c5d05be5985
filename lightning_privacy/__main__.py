"""``python -m lightning_privacy`` is the command ``lightning-privacy``."""

from __future__ import annotations

import sys

from lightning_privacy.cli import main

if __name__ == "__main__":
    sys.exit(main())
