"""Tables in a file keep their words whole."""

from __future__ import annotations

from lightning_privacy.cli.tables import print_table


def test_a_table_in_a_file_is_as_wide_as_its_words(capsys) -> None:
    columns = [f"a column of many words, number {number}" for number in range(8)]
    print_table("Everything", columns, [["a cell of words"] * 8])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(column in line for line in lines) for column in columns)
    assert len(lines[1]) > 200
