"""Readers in other processes while a run is written: no lock, no error, and each result closes over what it saw.

`EXPLAIND_SECONDS=300 pytest tests/test_readers.py` reads for longer.
"""

import os
import subprocess
import sys
from pathlib import Path

SECONDS = float(os.environ.get("EXPLAIND_SECONDS", "2"))
NUM_READERS = 4
PROGRAM = """
import os, sys, time, warnings
import torch
import torch.nn.functional as F
import explaind
from explaind.errors import StoreFormatError
from explaind.recording import writer
from tests.cases import data, mlp, query
from tests.traced import step_on

torch.set_num_threads(1)
warnings.simplefilter("error")
path, seconds = sys.argv[1], float(sys.argv[2])
writer._BLOCK_BYTES = 3000

def write(path, is_over):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with explaind.trace(model, optimizer, path) as recorder:
        while not is_over(recorder.num_steps):
            step_on(model, optimizer, [recorder.num_steps % 9, recorder.num_steps * 5 % 9])

def read(path, until, least):
    counts = []
    while time.monotonic() < until or len(set(counts)) < least:
        try:
            run = explaind.open_run(path, model=mlp())
        except StoreFormatError as error:
            assert not counts and ("before its first" in str(error) or "no such directory" in str(error)), error
            continue
        last = range(max(0, run.num_steps - 2), run.num_steps)
        run.attribute(query(num=1), by=("query", "example", "step"), steps=last).check()
        run.params(run.num_steps // 2)
        run.state(run.num_steps)
        counts.append(run.num_steps)
    assert counts == sorted(counts)
    return len(counts)

def fork(action):
    if (child := os.fork()) == 0:
        action()
        os._exit(0)
    return child

write(f"{path}.first", lambda steps: steps == 2)
read(f"{path}.first", 0, 1)  # the first time takes longer
until = time.monotonic() + seconds
readers = [fork(lambda: print(f"{read(path, until, 3)}\\n", end="", flush=True)) for _ in range(int(sys.argv[3]))]
writing = fork(lambda: write(path, lambda steps: os.path.exists(f"{path}.stop")))
failed = [os.waitpid(child, 0)[1] for child in readers]
open(f"{path}.stop", "w").close()
sys.exit(any(failed) or os.waitpid(writing, 0)[1] != 0)
"""


def test_readers_see_prefixes_while_a_run_is_written(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run.zarr"), str(SECONDS), str(NUM_READERS)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    counts = [int(line) for line in found.stdout.splitlines()]
    assert len(counts) == NUM_READERS
