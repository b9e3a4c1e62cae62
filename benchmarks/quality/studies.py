"""The paper's studies: each a list of named configurations, and what the paper says of them.

``python -m benchmarks.quality --study NAME`` runs one as it runs the table, with a learning rate searched for every
configuration; its record ends with a sentence for each claim: whether these runs agree. All have, unless
they say otherwise, ``p = 1/8`` and ``T = 10``, with which each block moves several times in a run. ``--study paper``
makes all those with a claim in one record, ``--study levers`` those of ``levers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import levers, period_data
from .analysis import SIGNIFICANT
from .methods import METHODS, Method, losia
from .plan import Row

T10: dict[str, Any] = {"period": 10}
FIXED: dict[str, Any] = {"period": None}


@dataclass(frozen=True)
class Claim:
    """``better`` has the lower loss on the target than ``worse``, or (``equal``) no other."""

    better: str
    worse: str
    says: str
    equal: bool = False


@dataclass(frozen=True)
class Study:
    """``conclude``, of its rows: what its record has besides, ``sentences`` among it."""

    methods: dict[str, Method]
    claims: tuple[Claim, ...]
    conclude: Callable[[list[Row]], dict[str, Any]] | None = None


def _each(
    field: str, values: list[Any], names: list[str] | None = None, **shared: Any
) -> dict[str, Method]:
    names = names or [str(v) for v in values]
    return {
        f"{field}={n}": losia(**{**T10, **shared, field: v})
        for n, v in zip(names, values, strict=True)
    }


ASYNC = "async, T=10"
STUDIES = {
    "relocalization": Study(
        {ASYNC: losia(**T10), "sync, T=10": losia(**T10, schedule="sync"), "fixed": losia(**FIXED)},
        (
            Claim(ASYNC, "fixed", "asynchronous re-localization is better than none"),
            Claim(ASYNC, "sync, T=10", "asynchronous re-localization is better than synchronous"),
        ),
    ),
    "selection": Study(
        {
            "fixed, random": losia(**FIXED),
            "fixed, by importance": losia(**FIXED, init="calibrate"),
            "re-localized from random": losia(**T10),
            "re-localized from importance": losia(**T10, init="calibrate"),
        },
        (
            Claim("fixed, by importance", "fixed, random", "subnets chosen by importance are better than random ones"),
            Claim("re-localized from random", "fixed, random", "re-localized subnets are better than random ones"),
        ),
    ),
    "rewarming": Study(
        _each("rewarm", [True, False]),
        (Claim("rewarm=True", "rewarm=False", "rewarming a moved subnet's learning rate is better than not"),),
    ),
    "score": Study(
        _each("score", ["iu", "i", "u"]),
        (
            Claim("score=iu", "score=i", "importance times uncertainty is better than importance alone"),
            Claim("score=iu", "score=u", "importance times uncertainty is better than uncertainty alone"),
        ),
    ),
    "importance": Study(
        _each("importance", ["taylor", "first", "second"]),
        (
            Claim("importance=taylor", "importance=first", "both orders are better than the first alone"),
            Claim("importance=taylor", "importance=second", "both orders are better than the second alone"),
        ),
    ),
    "beta1": Study(
        {  # without smoothing uncertainty is 0, and importance alone is left
            **_each("beta1", [0.0], ["0, score=i"], score="i"),
            **_each("beta1", [0.5, 0.85, 0.95]),
        },
        (Claim("beta1=0.85", "beta1=0, score=i", "smoothing importance at 0.85 is better than not smoothing it"),),
    ),
    "beta2": Study(
        _each("beta2", [0.0, 0.5, 0.85, 0.95]),
        (Claim("beta2=0.85", "beta2=0.0", "smoothing uncertainty at 0.85 is better than not smoothing it"),),
    ),
    "p": Study(
        _each("rank_factor", [1 / 16, 1 / 8, 1 / 4, 1 / 2], ["1/16", "1/8", "1/4", "1/2"]),
        (Claim("rank_factor=1/8", "rank_factor=1/16", "larger subnets are better, up to a point"),),
    ),
    "p_o": Study(
        _each("output_factor", [0.0, 1 / 8, 1.0], ["0", "1/8", "1"]),
        (
            Claim("output_factor=1/8", "output_factor=0", "an eighth of the output head is better than none"),
            Claim("output_factor=1/8", "output_factor=1", "an eighth of the output head does as well as all", True),
        ),
    ),
    "period": Study(
        _each("period", list(period_data.PERIODS)),
        (Claim("period=10", "period=100", "the period has an optimum that grows with the data"),),
    ),
    # Levers beyond the paper, which has no claim on them.
    "shapes": Study(
        {
            f"1/{into} x 1/{64 // into}, fixed": losia(**FIXED, in_factor=1 / into, out_factor=into / 64)
            for into in (64, 32, 16, 8, 4, 2, 1)
        },
        (),
    ),
    "groups": Study(levers.fast(**FIXED, rank_factor=1 / 4), ()),
}  # fmt: skip

LEVERS = {name: Study(methods, ()) for name, methods in levers.STUDIES.items()}


def together(studies: dict[str, Study]) -> Study:
    """All of them in one record: a configuration that several have is run once, by the name in the first."""
    found: dict[str, tuple[str, Method]] = {}
    for study, s in studies.items():
        for name, method in s.methods.items():
            found.setdefault(method.decides(), (f"{study}, {name}", method))
    claims = [
        replace(c, better=found[s.methods[c.better].decides()][0], worse=found[s.methods[c.worse].decides()][0])
        for s in studies.values()
        for c in s.claims
    ]  # fmt: skip
    return Study(dict(found.values()), tuple(claims))


STUDIES["period-data"] = Study(period_data.CONFIGURATIONS, (), period_data.conclude)
STUDIES["paper"] = together({name: s for name, s in STUDIES.items() if s.claims})
STUDIES |= LEVERS
STUDIES["levers"] = together(LEVERS)

for _name, _study in STUDIES.items():
    for _key, _method in _study.methods.items():
        METHODS[f"{_name}: {_key}"] = _method


def names(study: str) -> list[str]:
    """Its methods as METHODS has them."""
    return [f"{study}: {name}" for name in STUDIES[study].methods]


def conclusions(study: str, rows: list[Row]) -> dict[str, Any]:
    """What a study's record says of its rows: ``sentences``, and tables of its own."""
    further = STUDIES[study].conclude
    return further(rows) if further else {"sentences": sentences(study, rows)}


def sentences(study: str, rows: list[Row]) -> list[str]:
    """One for each claim: on how many targets these runs agree, by paired tests over the seeds."""
    found = []
    by = {(r["method"], r["target"]): r for r in rows}
    for claim in STUDIES[study].claims:
        wins = losses = compared = 0
        for target in dict.fromkeys(r["target"] for r in rows):
            row = by.get((f"{study}: {claim.better}", target), {})
            against = row.get("against", {}).get(f"{study}: {claim.worse}", {})
            if against.get("test_loss_p") is not None:
                compared += 1
                clear = against["test_loss_p"] < SIGNIFICANT
                wins += clear and against["test_loss"] < 0
                losses += clear and against["test_loss"] > 0
        if claim.equal:
            verdict = "agrees" if not losses else "does not agree"
        else:
            verdict = (
                "agrees"
                if wins > compared / 2
                else "does not agree"
                if wins <= losses
                else "agrees in part"
            )
        found.append(
            f"The paper: {claim.says}. Here: {claim.better} against {claim.worse} is better on {wins}, worse on "
            f"{losses} of {compared} targets (paired, p < {SIGNIFICANT}): {verdict if compared else 'not yet known'}."
        )
    return found
