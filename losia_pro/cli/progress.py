"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .memory import say_bytes

WIDE = 100  # columns; on fewer, the figures leave no room for the bar


class TrainingProgress:
    """One method's training, as it goes."""

    def __init__(self, console: Console, method: str, steps: int) -> None:
        self.console, self.method, self.steps = console, method, steps
        self.fields: dict[str, Any] = dict.fromkeys(
            ("loss", "held_out", "lr", "rate", "memory"), ""
        )
        self.bar: Progress | None = None
        if console.is_terminal:
            figures = " ".join(f"{{task.fields[{name}]}}" for name in self.fields)
            columns: list[ProgressColumn] = [TextColumn(f"[bold]{method:<9}[/]")]
            if console.width >= WIDE:
                columns.append(BarColumn(bar_width=None))
            columns += [
                MofNCompleteColumn(),
                TextColumn(figures),
                TimeRemainingColumn(compact=True),
            ]
            self.bar = Progress(*columns, console=console, expand=console.width >= WIDE)
            self.task = self.bar.add_task(method, total=steps, **self.fields)

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, memory: float) -> None:
        """After an optimizer step; ``memory`` in bytes."""
        self.fields.update(
            loss=f"loss {loss:.3f}",
            lr=f"lr {lr:.1e}".replace("e-0", "e-").replace("e+0", "e"),
            rate=_rate(tokens_per_s),
            memory=say_bytes(memory),
        )
        self._show(step)

    def evaluated(self, step: int, loss: float) -> None:
        """After a held-out loss was measured."""
        self.fields["held_out"] = f"held-out {loss:.3f}"
        self._show(step)
        if not self.bar:
            shown = "  ".join(text for text in self.fields.values() if text)
            print_line(self.console, self.method, step, self.steps, shown)

    def _show(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, **self.fields)


def print_line(console: Console, method: str, step: int, steps: int, figures: str) -> None:
    """Where there is no bar."""
    console.print(f"{method:<9} {step:>5}/{steps}  {figures}", highlight=False, soft_wrap=True)


def _rate(tokens_per_s: float) -> str:
    if tokens_per_s < 1000:
        return f"{tokens_per_s:.0f} tok/s"
    return f"{tokens_per_s / 1000:.1f}k tok/s"


@contextmanager
def training_progress(console: Console, method: str, steps: int) -> Iterator[TrainingProgress]:
    """Shows the bar within it."""
    progress = TrainingProgress(console, method, steps)
    if progress.bar is None:
        yield progress
        return
    with progress.bar:
        yield progress
