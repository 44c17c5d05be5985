"""The page: whole in itself, marked, escaped, and readable by a machine that reads it aloud."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lightning_privacy.reports import Finding, RunFacts, Statements, html_page, privacy_record
from lightning_privacy.reports.curves import LinePlot, short
from tests.reports.test_tables import summary

VOID = {"meta", "circle", "path"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.loads += [tag for name in ("src", "href") if name in named]
        self.loads += [tag] if tag in {"script", "link", "iframe"} else []
        self.ids += [named["id"]] if named.get("id") else []  # type: ignore[list-item]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    plan = summary().plan
    facts = RunFacts(
        findings=[Finding(name="loss", figures={"AUROC": 0.53, "advantage": 0.04})],
        series={"loss": [(1, 3.0), (2, 2.0)], "noise_to_signal": [(1, 0.1), (2, 900.0)]},
        statements=Statements(utility="<b>good</b> & cheap"),
    )
    spent = summary(epsilon=plan.epsilon(), releases=(plan.release(100),), clipped_share=0.5)
    return html_page(privacy_record(spent, facts))


def test_it_is_well_formed_and_loads_nothing(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.loads == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert "url(" not in page
    assert "http" not in page


def test_it_is_made_for_everyone(page: str) -> None:
    assert '<html lang="en">' in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<h1>") == 1
    for plot in re.findall(r"<svg.*?</svg>", page, re.S):
        labelled = re.search(r'aria-labelledby="(\S+) (\S+)"', plot)
        assert labelled
        assert all(f'id="{name}"' in plot for name in labelled.groups())
    assert 'scope="row"' in page
    assert 'scope="col"' in page


def test_a_table_s_cells_carry_their_column_for_a_phone(page: str) -> None:
    ledger = page.partition("<h2>Ledger</h2>")[2].partition("</section>")[0]
    columns = re.findall(r'<th scope="col">([^<]+)</th>', ledger)
    assert columns == re.findall(r'<td data-column="([^"]+)">', ledger)
    assert "parts of a unit" in columns
    phone = page.partition("@media (max-width: 40rem)")[2]
    assert "content: attr(data-column)" in phone


def test_people_s_words_are_escaped(page: str) -> None:
    assert "&lt;b&gt;good&lt;/b&gt; &amp; cheap" in page


def test_what_was_computed_on_private_data_is_marked(page: str) -> None:
    for title in ("Leakage measured", "Components of the training"):
        section = page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]
        assert 'class="tag">not covered by ε' in section
    for title in ("Training loss", "Noise over signal in the sum"):
        assert re.search(rf"<figcaption>{title} <span class=\"tag\">not covered by ε", page)


def test_a_run_without_privacy_says_so() -> None:
    infinite = float("inf")
    record = privacy_record(
        summary(deterministic=True, epsilon=infinite, epsilon_at_stop=infinite), RunFacts()
    )
    shown = html_page(record)
    assert "This run has no privacy guarantee" in shown
    assert "<dd>∞</dd>" in shown
    assert "DP for 100" not in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1e-5, "1e-5"), (2.5e-7, "2.5e-7"), (1200, "1200"), (2e7, "2e7")],
)
def test_numbers_of_an_axis(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("points", [[(0, 0), (1, 0)], [(1, 5), (2, 5)], [(1, -3), (2, 4)]])
def test_flat_and_negative_curves_can_be_drawn(points: list[tuple[float, float]]) -> None:
    plot = LinePlot(name="p", title="t", x_label="x", y_label="y", points=points)
    assert "nan" not in plot.svg()
