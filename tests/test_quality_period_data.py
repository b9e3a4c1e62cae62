"""benchmarks/quality/period_data.py: less data is fewer rows and fewer steps; what is concluded from the periods."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.quality import model, period_data, settings, studies, training
from benchmarks.quality.corpora import Part
from benchmarks.quality.methods import METHODS
from benchmarks.quality.period_data import PERIODS, SIZES, STUDY, conclude, name

TOY = settings.SIZES["toy"]


def test_three_sizes_by_five_periods_and_all_the_data_is_the_study_of_the_period():
    assert len(period_data.CONFIGURATIONS) == 15
    for period in PERIODS:
        plain = METHODS[f"period: period={period}"].decides()
        assert METHODS[f"{STUDY}: {name('1', period)}"].decides() == plain


@pytest.mark.parametrize("size", SIZES)
def test_a_share_of_the_data_is_its_first_rows_and_that_share_of_the_steps(size, monkeypatch):
    """Counted in what the model is given: 40 rows in batches of 8 for 12 steps, so that rows come again."""
    rows = torch.randint(1, 256, (40, TOY.length + 1), dtype=torch.uint8)
    rows[:, 0] = torch.arange(40)
    part = Part(
        rows, torch.zeros(40, dtype=torch.int16), torch.full((40,), TOY.length, dtype=torch.int16)
    )
    seen: list[list[int]] = []
    loss = model.training_loss

    def counted(net, batch):
        seen.append(batch.rows[:, 0].tolist())
        return loss(net, batch)

    monkeypatch.setattr(training.model, "training_loss", counted)
    setting = settings.dataclasses.replace(TOY, steps=12)
    job = {"method": f"{STUDY}: {name(size, 5)}", "target": "cpp", "lr": 1e-2, "seed": 0}
    domains = {"cpp": dict.fromkeys(("train", "valid", "test"), part)}
    domains["python"] = domains["cpp"]
    net = model.build(TOY, torch.device("cpu"))
    training.tune(setting, net, domains, job, False)
    share = SIZES[size]
    assert len(seen) == 12 * share
    assert {row for batch in seen for row in batch} == set(range(round(40 * share)))


def rows_of(best: dict[str, list[int]], p: float = 0.01) -> list[dict]:
    """A record's rows in which a target's losses are least at these periods, by size."""
    rows = []
    for target, periods in best.items():
        for size, least in zip(SIZES, periods, strict=True):
            names = {t: f"{STUDY}: {name(size, t)}" for t in PERIODS}
            for t, method in names.items():
                against = {other: {"test_loss_p": p} for other in names.values() if other != method}
                row = {"method": method, "target": target, "against": against}
                rows.append({**row, "test_loss": 2.0 + abs(t - least), "test_loss_se": 0.1})
    return rows


def test_the_study_says_whether_the_best_period_grows_with_the_data():
    grown = {"cpp": [5, 10, 50], "docs": [10, 10, 20]}
    found = conclude(rows_of(grown))
    assert [line["best_period"] for line in found["period_data"]] == [5, 10, 50, 10, 10, 20]
    assert found["period_data"][0]["test_loss"]["20"] == 17
    (sentence,) = found["sentences"]
    assert "cpp: 5, 10, 50; docs: 10, 10, 20. It grows on 2 of 2 targets, on 2 of" in sentence
    assert sentence.endswith(": agrees.")
    assert conclude(rows_of(grown, p=0.2))["sentences"][0].endswith(": agrees in part.")
    other = {"cpp": [50, 10, 5], "docs": [5, 20, 10], "man": [5, 5, 5], "config": [5, 20, 5]}
    (sentence,) = conclude(rows_of(other))["sentences"]
    assert "grows on 0 of 4" in sentence and "falls on 1, stays on 1" in sentence
    assert "between on 2" in sentence and sentence.endswith(": does not agree.")


def test_a_size_without_all_its_periods_says_nothing_yet():
    rows = rows_of({"cpp": [5, 10, 50]})
    assert conclude(rows[1:])["sentences"][0].endswith("not yet known.")
    assert studies.conclusions(STUDY, [])["period_data"] == []
    rows[0]["test_loss"] = None  # diverged
    assert [line["data"] for line in conclude(rows)["period_data"]] == ["1/2", "1"]


def test_the_table_marks_the_best_period_of_each_size():
    text = period_data.text(conclude(rows_of({"cpp": [5, 10, 50]}))["period_data"])
    assert [line.split().index("2.0000*") for line in text.splitlines()[2:]] == [2, 3, 5]
    assert period_data.text([]) == ""
