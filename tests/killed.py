"""Training processes that are killed: at named points of the writing, or whenever somebody wants it.

`python -m tests.killed` imports once what training takes; for every line of JSON that it reads it forks a process and
prints its id.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # by the first optimizer, in most of a child's time
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import explaind
import explaind.recording.recorder  # by the first trace
from explaind.recording import chunks, writer

NUM_STEPS = 30


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens))[:, -1])


def make_model():
    torch.manual_seed(0)
    return Transformer().double()


def data():
    tokens = torch.tensor([[first, second] for first in range(7) for second in range(7)])
    return TensorDataset(tokens, tokens.sum(dim=1) % 7)


def train(path, *, block_bytes, durable, overwrite, resume, finished):
    """Train and record; writes a byte to a file after each step."""
    writer._BLOCK_BYTES, writer._CHEAP_SECONDS = block_bytes, 10.0  # blocks are published at once on a slow device too
    chunks._LARGEST_BYTES, chunks._LEAST_BYTES = 20_000, 2_000
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, step_size=5, gamma=0.9)
    loader = DataLoader(data(), batch_size=12, shuffle=True, generator=torch.Generator().manual_seed(1))
    progress = os.open(finished, os.O_WRONLY | os.O_CREAT)
    with explaind.trace(model, optimizer, path, durable=durable, overwrite=overwrite, resume=resume) as recorder:
        recorder.keep(scheduler)
        while recorder.num_steps < NUM_STEPS:
            for tokens, sums in recorder.batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(tokens), sums).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                os.write(progress, b".")


class Points:
    """Kills this process when it comes to a point for the n-th time."""

    def __init__(self, point, count):
        self.point, self.count, self.seen = point, count, Counter()
        self.writev, self.replace, self.rename, self.unlink = os.writev, os.replace, Path.rename, Path.unlink
        os.writev, os.replace = self.half_written, self.watch("rename", self.replace)
        Path.rename, Path.unlink = self.watch("rename", self.rename), self.watch("unlink", self.unlink)

    def reach(self, point):
        self.seen[point] += 1
        if point == self.point and self.seen[point] == self.count:
            os.kill(os.getpid(), signal.SIGKILL)

    def half_written(self, descriptor, parts):
        whole = b"".join(parts)
        written = os.write(descriptor, whole[: len(whole) // 2])
        self.reach(f"half of {kind(str(Path(f'/proc/self/fd/{descriptor}').readlink()))}")
        return written + os.write(descriptor, whole[written:])

    def watch(self, name, call):
        def watched(source, *args, **options):
            what = kind(str(args[0] if args else source))
            self.reach(f"before {name} of {what}")
            result = call(source, *args, **options)
            self.reach(f"after {name} of {what}")
            return result

        return watched


def kind(path):
    """What is in a file of a store."""
    path = path.removesuffix(".partial") if "/run.zarr/" in path or "/run.zarr.new.partial/" in path else path
    within = path.partition("/run.zarr/")[2] or path.partition("/run.zarr.new.partial/")[2]
    if not within:
        return {".lock": "lock", ".partial": "old run"}.get(Path(path).suffix, "run")
    if "/c/" in within:
        return "chunk"
    return {"zarr.json": "attributes", "commit.json": "commit"}.get(within, "metadata")


def main():
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            order = json.loads(line)
            if point := order.pop("point"):
                Points(*point)
            train(**order)
            os._exit(0)
        print(child, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
