"""Plain text tables: the first column to the left, figures to the right."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart; the first ``left`` of them are words."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in pairs).rstrip()

    return "\n".join([line(lines[0]), "  ".join("-" * w for w in widths), *map(line, lines[1:])])


def number(value: float | None, digits: int = 3) -> str:
    """That many significant digits, no exponent; a dash for none."""
    if value is None:
        return "-"
    size = abs(value)
    whole = len(str(int(size))) if size >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"


def ratio(value: float | None, reference: float | None) -> str:
    """``1.034x``; a dash where one of the two is missing."""
    return "-" if not value or not reference else f"{value / reference:.3f}x"
