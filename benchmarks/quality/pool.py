"""Processes that make runs on one device, several at once: each has the data and the base model in memory."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .plan import BASE, Job
from .settings import Setting


@dataclass(frozen=True)
class Place:
    """Where the runs are made: the device, and the folders of the data and of the base model."""

    device: str
    data: Path
    base: Path
    compiled: bool


def work(connection: Connection, setting: Setting) -> None:
    """A worker: takes its place and then jobs until there is None, answers with rows. The job "pretrain" makes the
    base model."""
    import torch

    from . import corpora, model, studies, training  # noqa: F401 - the studies' methods

    place: Place | None = connection.recv()
    if place is None:
        return
    torch.set_num_threads(1)
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    domains = corpora.load(place.data, device)
    base: Any = None
    while (job := connection.recv()) is not None:
        try:
            if job == "pretrain":
                begun = time.perf_counter()
                made = model.pretrain(
                    setting, corpora.load_pretraining(place.data, device), place.compiled
                )
                model.save(made, place.base)
                connection.send({"seconds": round(time.perf_counter() - begun, 1)})
                continue
            if base is None:
                base = model.build(setting, device)
                if not model.load(base, place.base):
                    raise RuntimeError(f"no base model of this size in {place.base}")
            if job["method"] == BASE:
                row = training.measure(setting, base, domains, job["target"])
            else:
                row = _tune(setting, base, domains, job, place.compiled)
            connection.send({"status": "ok", **row})
        except Exception as error:  # noqa: BLE001 - the runs after this one are still worth making
            where = traceback.extract_tb(error.__traceback__)[-1]
            connection.send(
                {
                    "status": "failed",
                    "reason": f"{type(error).__name__}: {str(error)[:300]}",
                    "at": f"{where.filename}:{where.lineno}",
                }
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
        gc.collect()  # models hang in cycles of hooks


def _tune(setting: Setting, base: Any, domains: Any, job: Any, compiled: bool) -> dict[str, Any]:
    """Compiled; once more as it is if that fails, and the row says so."""
    from . import training

    if compiled:
        try:
            return training.tune(setting, base, domains, job, True)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises
            reason = f"{type(error).__name__}: {str(error)[:300]}"
        return {
            **training.tune(setting, base, domains, job, False),
            "not_compiled_because": reason,
        }
    return training.tune(setting, base, domains, job, False)


class Pool:
    """Workers and what each is doing. ``run`` hands out jobs and yields rows as they come."""

    def __init__(self, workers: int, setting: Setting) -> None:
        context = get_context("spawn")
        self.connections: list[Any] = []
        self.processes: list[Any] = []
        for _ in range(workers):
            mine, its = context.Pipe()
            process = context.Process(target=work, args=(its, setting), daemon=True)
            process.start()
            its.close()
            self.connections.append(mine)
            self.processes.append(process)

    def open(self, place: Place) -> None:
        """Tell the workers, which have imported what they need meanwhile, where things are."""
        for connection in self.connections:
            connection.send(place)

    def pretrain(self) -> dict[str, Any]:
        """Make the base model on the first worker."""
        self.connections[0].send("pretrain")
        answer: dict[str, Any] = self.connections[0].recv()
        if answer.get("status") == "failed":
            raise RuntimeError(f"pretraining: {answer['reason']} at {answer['at']}")
        return answer

    def run(
        self, next_job: Callable[[str | None, list[Job]], Job | None]
    ) -> Iterator[tuple[Job, dict[str, Any]]]:
        """``next_job(last method, jobs under way)`` gives a job, or None for none now; ends when none is under
        way and none is given. A worker that dies is left out, and its job is failed."""
        busy: dict[Any, Job] = {}
        last: dict[Any, str] = {}
        alive = list(self.connections)
        while alive:
            for connection in alive:
                if connection not in busy:
                    job = next_job(last.get(connection), list(busy.values()))
                    if job is not None:
                        connection.send({**asdict(job), "lr": job.lr})
                        busy[connection], last[connection] = job, job.method
            if not busy:
                return
            for connection in wait(list(busy)):
                job = busy.pop(connection)
                try:
                    row = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    alive.remove(connection)
                    row = {"status": "failed", "reason": "the worker died"}
                yield job, row

    def close(self) -> None:
        """End the workers: those that are idle by themselves, the others after a few seconds."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        deadline = time.perf_counter() + 5
        for process in self.processes:
            process.join(max(0.0, deadline - time.perf_counter()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
