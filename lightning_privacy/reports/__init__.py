"""What a private run shows and stores about itself."""

from __future__ import annotations

from lightning_privacy.reports.files import rebuild_page, write_report
from lightning_privacy.reports.page import html_page
from lightning_privacy.reports.record import (
    Finding,
    RunFacts,
    Statements,
    formal_statement,
    privacy_record,
    read_record,
    without_uncovered,
)
from lightning_privacy.reports.tables import (
    NOT_COVERED,
    PrivacySummary,
    not_covered,
    print_summary,
    summary_rows,
)

__all__ = [
    "NOT_COVERED",
    "Finding",
    "PrivacySummary",
    "RunFacts",
    "Statements",
    "formal_statement",
    "html_page",
    "not_covered",
    "print_summary",
    "privacy_record",
    "read_record",
    "rebuild_page",
    "summary_rows",
    "without_uncovered",
    "write_report",
]
