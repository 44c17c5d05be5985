"""What a private run shows and stores about itself."""

from __future__ import annotations

from lightning_privacy.reports.tables import (
    NOT_COVERED,
    PrivacySummary,
    not_covered,
    print_summary,
    summary_rows,
)

__all__ = ["NOT_COVERED", "PrivacySummary", "not_covered", "print_summary", "summary_rows"]
