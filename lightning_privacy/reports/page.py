"""The privacy report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.reports.curves import LinePlot, short
from lightning_privacy.reports.record import formal_statement
from lightning_privacy.reports.style import STYLE
from lightning_privacy.reports.tables import NOT_COVERED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Record = Mapping[str, Any]

_MARK = f'<span class="tag">{escape(NOT_COVERED)}</span>'
_SERIES = {
    "loss": ("Training loss", "loss", False),
    "clipped_share": ("Share of units clipped", "share", False),
    "mean_norm": ("Mean gradient norm before clipping", "norm", True),
    "noise_to_signal": ("Noise over signal in the sum", "ratio", True),
}


def html_page(record: Record) -> str:
    """Lay a record out as a page.

    Args:
        record: What `privacy_record` or `read_record` returned.

    Returns:
        A whole HTML document.
    """
    sections = [
        _coverage(record),
        _section("Mechanism", _rows(record["mechanism"])),
        _accounting(record),
        _ledger(record),
        _leakage(record),
        _components(record),
        _questions(record),
        _provenance(record),
    ]
    return _DOCUMENT.format(
        style=STYLE,
        header=_header(record),
        main="\n".join(filter(None, sections)),
        footer="" if record["covered_only"] else _DATA_BESIDE,
    )


def _header(record: Record) -> str:
    promise = record["guarantee"]
    private = promise["epsilon"] is not None
    shown = shown_epsilon(promise["epsilon"]) if private else "∞"
    facts = [("ε", shown), ("δ", f"{promise['delta']:g}"), ("unit", promise["unit"]),
             ("steps", f"{promise['steps']} of {promise['planned_steps']}")]  # fmt: skip
    cards = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    notes = [f'<p class="{"" if private else "warning"}">{escape(formal_statement(record))}</p>']
    at_stop = promise["epsilon_at_stop"]
    if private and at_stop is not None and at_stop < promise["epsilon"] * (1 - 1e-9):
        notes.append(
            f"<p>At the stop after {promise['steps']} steps: ε = {shown_epsilon(at_stop)}, "
            "<em>ex-post</em>: valid only if the stop did not depend on the data.</p>"
        )
    if record["outcome"] != "completed":
        notes.append(f'<p class="warning">{escape(record["outcome"])}</p>')
    return f'<dl class="cards">{cards}</dl>\n' + "\n".join(notes)


def _coverage(record: Record) -> str:
    covered = _items(record["covered"]) or "<p>Nothing: there is no guarantee.</p>"
    others = "".join(
        f"<li><strong>{escape(what)}.</strong> {escape(why)}</li>"
        for what, why in record["not_covered"]
    )
    return _section(
        "What is covered, and what is not",
        f'<div class="columns"><div><h3>Covered by ε</h3>{covered}</div>'
        f"<div><h3>Not covered by ε</h3><ul>{others}</ul></div></div>",
    )


def _accounting(record: Record) -> str:
    named, ceiling = record["accountant"], record["advantage_ceiling"]
    text = (
        f"<p>Accountant: {escape(named['name'].upper())}, from {escape(named['package'])} "
        f"{escape(named['version'])}."
    )
    if ceiling is not None:
        text += (
            f" No attack on this mechanism tells one {escape(record['guarantee']['unit'])} in the "
            f"data from one that is not with a true-positive rate more than <strong>{ceiling:.3f}"
            "</strong> above its false-positive rate: δ at ε = 0."
        )
    curve = [(point["delta"], point["epsilon"]) for point in record["curve"]]
    plots = []
    if len(curve) > 1:
        promise = record["guarantee"]
        label = f"ε = {shown_epsilon(promise['epsilon'])} at δ = {promise['delta']:g}"
        marked = (promise["delta"], promise["epsilon"], label)
        plots.append(
            LinePlot(name="curve", title="ε at every δ, after the planned steps", x_label="δ",
                     y_label="ε", points=curve, log_x=True, marked=marked)
        )  # fmt: skip
    if len(record["spending"]) > 1:
        plots.append(
            LinePlot(name="spending", title="ε over the planned steps", x_label="private steps",
                     y_label="ε", points=[tuple(pair) for pair in record["spending"]])
        )  # fmt: skip
    return _section("Accounting", text + "</p>" + _figures(plots) + _numbers(curve))


def _numbers(curve: Sequence[tuple[float, float]]) -> str:
    if not curve:
        return ""
    rows = [[short(delta), shown_epsilon(value)] for delta, value in curve]
    table = _table(["δ", "ε"], rows)
    return f"<details><summary>The curve in numbers</summary>{table}</details>"


def _ledger(record: Record) -> str:
    columns = ["noise multiplier", "sample rate", "draws", "parts of a unit"]
    rows = [
        [f"{one['noise_multiplier']:.6g}", f"{one['sample_rate']:.6g}", str(one["count"]),
         str(one.get("group_size", 1))]
        for one in record["ledger"]["releases"]
    ]  # fmt: skip
    text = "<p>Everything that this run has charged, as the accountant adds it up.</p>"
    text += _table(columns, rows)
    shared = record["ledger"]["data_set"]
    if shared is None:
        return _section("Ledger", text + "<p>The run was booked in no ledger of a data set.</p>")
    names = {"dataset": "data set", "runs": "runs charged", "epsilon": "ε of all runs",
             "budget": "budget ε", "delta": "δ"}  # fmt: skip
    rows = [[label, str(shared[name])] for name, label in names.items()]
    return _section("Ledger", text + "<h3>All runs on the data set</h3>" + _rows(rows))


def _leakage(record: Record) -> str:
    found = record["leakage"]
    if not found:
        why = "It is left out of this page." if record["covered_only"] else "Nothing was measured."
        return _section("Leakage measured", f"<p>{why}</p>")
    ceiling = record["advantage_ceiling"]
    text = f"<p>{_MARK} These figures say what some attacks found; no figure shows that there is "
    text += "nothing to find."
    if ceiling is not None:
        text += f" An advantage cannot truly be above {ceiling:.3f}, by the guarantee."
    names = list(dict.fromkeys(name for one in found for name in one["figures"]))
    rows = [[one["name"], *(_figure(one["figures"].get(name)) for name in names)] for one in found]
    notes = _items(dict.fromkeys(one["note"] for one in found if one["note"]))
    return _section("Leakage measured", text + "</p>" + _table(["attack", *names], rows) + notes)


def _figure(value: float | None) -> str:
    return "–" if value is None else short(value)


def _components(record: Record) -> str:
    rows, series = record["uncovered"]["rows"], record["uncovered"]["series"]
    if not rows and not series:
        return ""
    plots = [
        LinePlot(name=name.replace("_", "-"), title=title, x_label="private steps of this fit",
                 y_label=label, points=[tuple(pair) for pair in series[name]],
                 log_y=log and _spans_decades([pair[1] for pair in series[name]]))
        for name, (title, label, log) in _SERIES.items()
        if len(series.get(name, ())) > 1
    ]  # fmt: skip
    text = f"<p>{_MARK} Computed on private data without noise: for those who may see the data.</p>"
    shown = [[label.replace(f" [{NOT_COVERED}]", ""), value] for label, value in rows]
    return _section("Components of the training", text + _rows(shown) + _figures(plots, _MARK))


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 20 * min(values)


def _questions(record: Record) -> str:
    sources = dict.fromkeys(one["source"] for one in record["questions"])
    text = (
        "<p>What published guidance asks of a claim: the items of section 5.3 of the paper in our "
        "words, the parts of NIST&rsquo;s pyramid by their names.</p>"
    )
    for source in sources:
        rows = [[q["item"], q["answer"]] for q in record["questions"] if q["source"] == source]
        text += f"<h3>{escape(source)}</h3>" + _rows(rows)
    return _section("What a claim should say", text)


def _provenance(record: Record) -> str:
    files = list(record["checkpoint"].items()) or [("checkpoint", "none was written")]
    text = "<h3>Checkpoint</h3>" + _rows(files)
    text += "<h3>Versions</h3>" + _rows(list(record["software"].items()))
    return _section("Checkpoint and software", text)


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _items(texts: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""


def _rows(rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(str(label))}</th><td>{escape(str(value))}</td></tr>'
        for label, value in rows
    )
    return f'<table class="facts"><tbody>{cells}</tbody></table>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    # On a phone every row is a list of its cells, each with its column's name before it.
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-column="{escape(name)}">{escape(cell)}</td>'
            for name, cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    # Focusable, so that it can be scrolled by keyboard where it is wider than the screen.
    return (
        '<div class="scroll" tabindex="0"><table class="grid-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figures(plots: Sequence[LinePlot], mark: str = "") -> str:
    if not plots:
        return ""
    figures = "".join(
        f"<figure><figcaption>{escape(plot.title)} {mark}</figcaption>{plot.svg()}</figure>"
        for plot in plots
    )
    return f'<div class="figures">{figures}</div>'


_DATA_BESIDE = " The same facts as data: privacy_report.json."
_DOCUMENT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Privacy report</title>
<style>
{style}
</style>
</head>
<body>
<header>
<h1>Privacy report</h1>
{header}
</header>
<main>
{main}
</main>
<footer><p>Written by lightning_privacy.{footer}</p></footer>
</body>
</html>
"""
