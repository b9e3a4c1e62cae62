"""A process that is killed while it saves a delta leaves the old file or the new one, whole."""

from __future__ import annotations

import subprocess
import sys

# One process with torch loaded. Each attempt is a fork of it that saves another delta over the last, and tells when
# it begins to write; it is killed within as long as writing took before, and half as long again. The bytes are written
# as safetensors wrote them before 0.8, without a temporary name of its own.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import safetensors.torch, torch
import losia_pro

torch.set_num_threads(1)
path = Path(sys.argv[1]) / "d.safetensors"
dice = random.Random(0)
model = torch.nn.Sequential(torch.nn.Linear(768, 768, bias=False))
losia = losia_pro.attach(model, losia_pro.LosiaConfig(rank_factor=1.0))
def save(value, writing):
    def save_file(tensors, filename, metadata):
        data = safetensors.torch.save(tensors, metadata)
        writing()
        Path(filename).write_bytes(data)
    safetensors.torch.save_file = save_file
    losia.modules["0"].subnet.data.fill_(value)
    losia.save_delta(path)

times = []
for _ in range(5):
    save(0.0, lambda: times.append(-time.perf_counter()))
    times[-1] += time.perf_counter()
took = min(times)
header, kept, seen = losia_pro.delta.read(path)[0], 0.0, []
for attempt in range(40):
    ready, tell = os.pipe()
    new = attempt + 1.0
    child = os.fork()
    if child == 0:
        save(new, lambda: os.write(tell, b"."))
        signal.pause()
    os.close(tell)
    assert os.read(ready, 1) == b"."
    time.sleep(dice.uniform(0, 1.5 * took))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    os.close(ready)
    found, tensors = losia_pro.delta.read(path)
    values = tensors["0.values.0"].unique().tolist()
    assert found == header and values in ([kept], [new]), f"attempt {attempt}: {values}"
    seen.append(values == [new])
    kept = values[0]
print(seen.count(True), seen.count(False))
"""


def test_forty_kills_at_random_moments_leave_a_whole_file_each(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    new, old = map(int, done.stdout.split())
    assert new + old == 40 and old > 0  # some hit a save before its file was complete
