"""Trainer runs that are killed at random moments go on from the last whole checkpoint, bitwise as if never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from losia_pro.integrations.transformers import last_checkpoint

KILLS = int(os.environ.get("LOSIA_KILLS", "3"))

# One process with everything loaded; each run is a fork of it, killed within as long as a whole run takes. The next
# one starts from the last checkpoint that was written to its end.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import toys, torch
from safetensors.torch import load_file
from test_trainer import STEPS, train
from losia_pro.integrations.transformers import last_checkpoint

torch.set_num_threads(1)
room, kills = Path(sys.argv[1]), int(sys.argv[2])
LAST = f"checkpoint-{STEPS}"

def run(folder):
    saved = last_checkpoint(folder)
    if saved is None or saved.name != LAST:
        train(folder, resume=saved and str(saved), save_strategy="steps", save_steps=1, save_total_limit=2)

def fork(folder, seconds=None):
    child = os.fork()
    if child == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            run(folder)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert seconds is not None or status == 0, (folder / "log").read_text()[-3000:]

def files(folder):
    saved = last_checkpoint(folder)
    optimizer = torch.load(saved / "optimizer.pt")
    return {"weights": load_file(saved / "model.safetensors"), "optimizer": optimizer, "step": saved.name}

whole = room / "whole"
whole.mkdir()
fork(whole)
begun = time.perf_counter()
os.rename(whole, room / "first")
whole.mkdir()
fork(whole)
took = time.perf_counter() - begun
dice, seen = random.Random(0), []
def enough():  # and at different moments, however slow the machine is
    return len(seen) >= kills and (len({name for name, _ in seen}) > 1 or len(seen) >= 40)

while not enough():
    folder = room / str(len(seen))
    folder.mkdir()
    saved = None
    while not enough() and (saved is None or saved.name != LAST):
        fork(folder, dice.uniform(0, took))
        saved = last_checkpoint(folder)
        numbers = [int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")]
        half = numbers and (saved is None or saved.name != f"checkpoint-{max(numbers)}")
        seen.append((saved.name if saved else None, bool(half)))
        if saved:
            files(folder)  # whole
    fork(folder)
    toys.equal_bits(files(folder), files(whole))
print(len(seen), len({name for name, _ in seen}), sum(half for _, half in seen))
"""


def test_a_killed_run_goes_on_bitwise(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(KILLS)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kills, different, halves = map(int, done.stdout.split())
    print(
        f"{kills} kills, {different} last checkpoints, {halves} times with a later one half-written"
    )
    assert kills >= KILLS and different > 1


def test_the_last_checkpoint_is_the_latest_that_is_whole(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for number, state in (
        (2, "{}"),
        (9, '{"global_step": 9}'),
        (10, '{"global_step": 10}'),
        (11, '{"glob'),
    ):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-10"
