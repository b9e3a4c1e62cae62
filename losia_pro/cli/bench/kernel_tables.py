"""What `bench kernels` prints of its rows."""

from __future__ import annotations

from typing import Any

from .points import LIBRARY
from .table import number, ratio, table
from .timing import Stats, quantile

Row = dict[str, Any]
COUNTERPARTS = ("torch", "triton", "cuda")


def figures(time: Stats | str) -> Row:
    """The part of a row that one candidate fills: its time, or why there is none."""
    if isinstance(time, str):
        return {"refused": time}
    return {
        "median_us": round(time.median, 3),
        "p20_us": round(time.p20, 3),
        "p80_us": round(time.p80, 3),
        "samples": time.samples,
    }


def median(row: Row, name: str) -> float | None:
    value: float | None = row["candidates"].get(name, {}).get("median_us")
    return value


def block(rows: list[Row]) -> str:
    """One table: microseconds, and the ratios of the default's time."""
    if rows[0]["op"] == "host":
        return _host(rows)
    names = [n for n in COUNTERPARTS if any(n in row["candidates"] for row in rows)]
    head = ["in x out", "selection", "least", LIBRARY, "default", *names]
    head += ["/least", f"/{LIBRARY}", f"/single {LIBRARY}"]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([place(row), "failed", *["-"] * (len(head) - 2)])
            continue
        mine = median(row, "default")
        lines.append(
            [
                place(row),
                row["selection"],
                number(row["least_us"]),
                *(_time(row, name) for name in (LIBRARY, "default", *names)),
                ratio(mine, row["least_us"]),
                ratio(mine, median(row, LIBRARY)),
                ratio(mine, row["single_library_us"]),
            ]
        )
    return table(head, lines, left=2)


def _host(rows: list[Row]) -> str:
    rows = [row for row in rows if "failed" not in row]
    names = list(rows[0]["candidates"]) if rows else []
    lines = [
        [
            row["selection"],
            *(number(median(row, name)) for name in names),
            number(row["beyond"]["median_us"]),
            number(row["beyond_least"]["median_us"]),
        ]
        for row in rows
    ]
    return table(["", *names, "beyond F.linear", "beyond least"], lines)


def _time(row: Row, name: str) -> str:
    candidate = row["candidates"].get(name)
    if candidate is None:
        return "-"
    return "WRONG" if "refused" in candidate else number(candidate["median_us"])


def place(row: Row) -> str:
    """Where a row was measured: a model, or a linear's shape."""
    if "model" in row:
        return f"{row['model']}, {row['layers']} layers"
    out = row.get("out")
    return f"{row['in']} x {out}" if out else str(row["in"])


def summary(rows: list[Row]) -> str:
    """For each operation and selection: the middle and the worst ratios over all shapes and tokens."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["candidates"] and row["op"] != "host":
            found.setdefault((row["op"], row["selection"]), []).append(row)
    lines = []
    for (op, selection), group in found.items():
        cells = []
        for reference in ("least", LIBRARY, "single"):
            ratios = [r for row in group if (r := ratio_to(row, reference)) is not None]
            if ratios:
                cells += [f"{quantile(ratios, 0.5):.3f}x", f"{max(ratios):.3f}x"]
            else:
                cells += ["-", "-"]
        lines.append([op, selection, str(len(group)), *cells])
    head = ["default", "selection", "points", "/least", "worst", f"/{LIBRARY}", "worst"]
    return table([*head, f"/single {LIBRARY}", "worst"], lines, left=2)


def ratio_to(row: Row, reference: str) -> float | None:
    """The default's time over least traffic, over plain PyTorch, or over plain PyTorch on single neurons."""
    mine = median(row, "default")
    values = {
        "least": row["least_us"],
        LIBRARY: median(row, LIBRARY),
        "single": row["single_library_us"],
    }
    other = values[reference]
    return mine / other if mine and other else None


def wrong(rows: list[Row]) -> list[str]:
    """A sentence for each result that was not right, and for each point that failed."""
    sentences = []
    for row in rows:
        where = f"{row['op']} {row['selection']}"
        if row["op"] != "host":
            tokens = f", {row['tokens']} tokens" if "tokens" in row else ""
            where += f" at {place(row)}{tokens}"
        if "failed" in row:
            sentences.append(f"{where}: {row['failed']}")
        for name, candidate in row["candidates"].items():
            if "refused" in candidate:
                sentences.append(f"{where}, {name}: {candidate['refused']}")
    return sentences
