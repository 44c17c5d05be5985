"""How the command line prints a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDEST = 1000


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table.

    Args:
        title: Stands above.
        columns: Their titles; all empty for none.
        rows: Cells as text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: square brackets would be read as markup.
    table = Table(title=Text(title), show_header=any(columns), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if any(columns) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:  # a file has no width, and words would be broken for none
        whole = console.measure(table, options=console.options.update(max_width=_WIDEST))
        console.width = max(console.width, whole.maximum)
    console.print(table)
