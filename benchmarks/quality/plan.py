"""Which runs are made, the most valuable first.

Learning rates are ``10 ** (k / 2)``. For each method and target three neighbouring ones are tried with the tuning
seeds; while the best is at an end of those tried, the next one is too. The final seeds, which are others, are then
trained at the best rate. Judged by the part "valid" of the held-out text; the table reports the part "test".
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .methods import METHODS

TUNING_SEED = 1000
FIRST_SEEDS = 3  # the final seeds that every method of a tier gets before the next tier
LOWEST, HIGHEST = -10, 1  # exponents: 1e-5 and about 3
BASE = "base"  # the method that trains nothing

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    stage: int
    method: str
    target: str
    exponent: int
    seed: int
    before: tuple[
        tuple[str, int], ...
    ] = ()  # targets and exponents of the tuning that comes before

    @property
    def lr(self) -> float:
        return rate(self.exponent)


def rate(exponent: int) -> float:
    return float(f"{10 ** (exponent / 2):.3g}")


class Plan:
    """``context``: all that decides a run's figures besides the job, by target; a run that was made in another
    context is another run."""

    def __init__(
        self,
        methods: Iterable[str],
        targets: Iterable[str],
        context: dict[str, str],
        seeds: int,
        tuning_seeds: int = 1,
        sequence: bool = False,
    ) -> None:
        self.methods, self.targets = list(methods), list(targets)
        self.context, self.seeds = context, seeds
        self.sequence = sequence  # the final runs tune to all targets, one after another
        self.tuning_seeds = [TUNING_SEED + k for k in range(tuning_seeds)]
        self.rows: dict[str, Row] = {}
        self.failures: dict[str, int] = {}
        self._keys: dict[Job, str] = {}

    def key(self, job: Job) -> str:
        """Names a run: what is done in which context, whatever the method is called."""
        if job not in self._keys:
            self._keys[job] = self._key(job)
        return self._keys[job]

    def _key(self, job: Job) -> str:
        method = METHODS[job.method].decides() if job.method != BASE else BASE
        parts = [self.context[job.target], method, job.target, job.exponent, job.seed]
        parts += [(self.context[target], target, exponent) for target, exponent in job.before]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def add(self, row: Row) -> None:
        """A finished run, of now or of before; a failed one may be tried once more."""
        if row["status"] == "ok":
            self.rows[row["key"]] = row
        else:
            self.failures[row["key"]] = self.failures.get(row["key"], 0) + 1

    def job(self, method: str, target: str, exponent: int, seed: int, stage: int = 0) -> Job:
        return Job(stage, method, target, exponent, seed)

    def row(self, method: str, target: str, exponent: int, seed: int) -> Row | None:
        return self.rows.get(self.key(Job(0, method, target, exponent, seed)))

    # --- what is to be done -------------------------------------------------------------------------

    def pending(self) -> list[Job]:
        """All jobs that can be run now and are not done, those that are under way among them; by stage."""
        return [
            job
            for job in self._jobs()
            if self.key(job) not in self.rows and self.failures.get(self.key(job), 0) < 2
        ]

    def _jobs(self) -> Iterator[Job]:
        for target in self.targets:
            yield Job(0, BASE, target, 0, 0)
        tiers = sorted({METHODS[m].tier for m in self.methods})
        for n, tier in enumerate(tiers):
            members = [m for m in self.methods if METHODS[m].tier == tier]
            for method in members:
                for target in self.targets:
                    for exponent in self.tried(method, target):
                        for seed in self.tuning_seeds:
                            yield Job(2 * n + 1, method, target, exponent, seed)
            yield from self._finals(members, range(min(FIRST_SEEDS, self.seeds)), 2 * n + 2)
        yield from self._finals(self.methods, range(FIRST_SEEDS, self.seeds), 2 * len(tiers) + 1)

    def _finals(self, methods: list[str], seeds: range, stage: int) -> Iterator[Job]:
        for seed in seeds:
            for method in methods:
                for job in self.finals(method, seed):
                    yield Job(stage, method, job.target, job.exponent, seed, job.before)

    def finals(self, method: str, seed: int) -> list[Job]:
        """A final run for each target, or one for all; those whose rates are found."""
        best = [(t, e) for t in self.targets if (e := self.best(method, t)) is not None]
        if not self.sequence:
            return [Job(0, method, target, exponent, seed) for target, exponent in best]
        if len(best) < len(self.targets):
            return []
        return [Job(0, method, *best[-1], seed, tuple(best[:-1]))]

    # --- the search for a learning rate -------------------------------------------------------------

    def losses(self, method: str, target: str) -> dict[int, float]:
        """Mean loss by exponent, of those whose tuning runs are all done; infinite where one diverged."""
        found = {}
        for exponent in range(LOWEST, HIGHEST + 1):
            rows = [self.row(method, target, exponent, seed) for seed in self.tuning_seeds]
            if all(rows):
                values = [row["valid_loss"] for row in rows if row]
                found[exponent] = math.inf if None in values else statistics.fmean(values)
        return found

    def tried(self, method: str, target: str) -> list[int]:
        """The exponents to try as far as is known now, in ascending order."""
        start = METHODS[method].start
        tried = [start - 1, start, start + 1]
        losses = self.losses(method, target)
        while all(e in losses for e in tried) and not all(math.isinf(losses[e]) for e in tried):
            best = min(tried, key=losses.__getitem__)
            if best == tried[0] > LOWEST:
                tried.insert(0, best - 1)
            elif best == tried[-1] < HIGHEST:
                tried.append(best + 1)
            else:
                break
        return tried

    def best(self, method: str, target: str) -> int | None:
        """The best exponent; None while the search goes on, or if nothing converged."""
        losses, tried = self.losses(method, target), self.tried(method, target)
        if not all(e in losses for e in tried):
            return None
        best = min(tried, key=losses.__getitem__)
        return None if math.isinf(losses[best]) else best

    def done(self) -> list[Row]:
        """The runs that are done; not those of other plans in the same file."""
        keys = dict.fromkeys(self.key(job) for job in self._jobs())
        return [self.rows[key] for key in keys if key in self.rows]

    def size(self) -> tuple[int, int]:
        """(done, all) as far as is known now: each search is at least three rates, and its finals follow."""
        finals = len(self.methods) * self.seeds * (1 if self.sequence else len(self.targets))
        wanted = sum(len(self.tried(m, t)) for m in self.methods for t in self.targets)
        return len(self.done()), len(self.targets) + wanted * len(self.tuning_seeds) + finals


def choose(jobs: list[Job], last: str | None, others: Iterable[str]) -> Job:
    """The next job for a worker: of the first stage, its last method again if it can be, since that is compiled
    already; else the method on which the fewest others are."""
    first = [job for job in jobs if job.stage == jobs[0].stage]
    busy = list(others)
    return min(first, key=lambda job: (job.method != last, busy.count(job.method)))
