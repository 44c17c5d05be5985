"""The tables of the benchmark pages are the means of the figures beside them."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict

from lightning_privacy.reports.outcomes import markdown, read_csv
from tests.docs.pages import ROOT

FOLDER = ROOT / "docs" / "benchmarks"


def test_the_table_of_users_is_that_of_its_figures() -> None:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with (FOLDER / "users.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["method"], row["epsilon"]].append(float(row["accuracy"]))
    page = (FOLDER / "users.md").read_text()
    for (method, epsilon), values in found.items():
        cell = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        rows = [line for line in page.splitlines() if line.startswith(f"| {method} |")]
        assert cell in (rows[0] if rows else page), (method, epsilon)
        assert len(values) == 3


def test_the_tables_of_models_are_those_of_their_outcomes() -> None:
    page = (FOLDER / "multimodal.md").read_text()
    for path in FOLDER.glob("multimodal_*.csv"):
        assert markdown(read_csv(path)) in page, path.name
