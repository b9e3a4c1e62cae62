"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .memory import say_bytes


class TrainingProgress:
    """One method's training, as it goes."""

    def __init__(self, console: Console, method: str, steps: int) -> None:
        self.console, self.method, self.steps = console, method, steps
        self.fields: dict[str, Any] = dict.fromkeys(
            ("loss", "held_out", "lr", "rate", "memory"), ""
        )
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = " ".join(f"{{task.fields[{name}]}}" for name in self.fields)
            self.bar = Progress(
                TextColumn(f"[bold]{method:<9}[/]"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn(columns),
                TimeRemainingColumn(compact=True),
                console=console,
                expand=True,
            )
            self.task = self.bar.add_task(method, total=steps, **self.fields)

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, memory: float) -> None:
        """After an optimizer step; ``memory`` in bytes."""
        self.fields.update(
            loss=f"loss {loss:.3f}",
            lr=f"lr {lr:.1e}",
            rate=f"{tokens_per_s / 1000:.1f} k tokens/s",
            memory=say_bytes(memory),
        )
        self._show(step)

    def evaluated(self, step: int, loss: float) -> None:
        """After a held-out loss was measured."""
        self.fields["held_out"] = f"held-out {loss:.3f}"
        self._show(step)
        if not self.bar:
            shown = "  ".join(text for text in self.fields.values() if text)
            line = f"{self.method:<9} {step:>5}/{self.steps}  {shown}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _show(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, **self.fields)


@contextmanager
def training_progress(console: Console, method: str, steps: int) -> Iterator[TrainingProgress]:
    """Shows the bar within it."""
    progress = TrainingProgress(console, method, steps)
    if progress.bar is None:
        yield progress
        return
    with progress.bar:
        yield progress
