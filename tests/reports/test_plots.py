"""The figures of the tables of models."""

from __future__ import annotations

import pytest

from lightning_privacy.reports import plots

pytest.importorskip("matplotlib")


def test_a_single_validation_is_a_point_and_not_nothing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    log = tmp_path / "full-eps8-seed0" / "log" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(
        "epoch,step,train_loss,val_loss\n0,0,2.3,\n0,1,2.2,\n0,1,,2.25\n", encoding="utf-8"
    )
    plots.plot_components([log], tmp_path / "components.svg", tmp_path / "indicators.svg")
    line, point = (figure.axes[0].lines[0] for figure in drawn)
    assert len(line.get_xdata()) == 2
    assert len(point.get_xdata()) == 1
    assert point.get_marker() not in {"None", None, ""}
