"""Record the sample run of `storage/sample.zarr`: a small network learns to read handwritten digits."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import explaind
from examples.digits_resnet import Digits, load_digits

SAMPLE = Path("storage/sample.zarr")
NUM_TRAIN, BATCH_SIZE, EPOCHS, SEED = 300, 30, 12, 0


def make_model() -> nn.Sequential:
    """The network, 1,066 parameters in three layers."""
    layers = {
        "pixels": nn.Flatten(),
        "first": nn.Linear(64, 12),
        "tanh1": nn.Tanh(),
        "second": nn.Linear(12, 12),
        "tanh2": nn.Tanh(),
        "output": nn.Linear(12, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def sample_digits() -> Digits:
    """The images that it learned from, in the order of their ids, and those that it has not seen."""
    return load_digits(NUM_TRAIN, SEED)


def train(path: Path) -> nn.Sequential:
    """A usual loop, traced; returns the trained network."""
    torch.manual_seed(SEED)
    digits, model = sample_digits(), make_model()
    optimizer = AdamW(model.parameters(), lr=0.02)
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), BATCH_SIZE, shuffle=True)
    with explaind.trace(model, optimizer, path, metadata={"data": "scikit-learn's digits"}) as recorder:
        for _ in range(EPOCHS):
            for images, labels in recorder.batches(loader):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                recorder.log(loss=loss)
                optimizer.step()
    return model


def main(arguments: list[str] | None = None) -> None:
    """Record the run, and keep an export of it, which leaves out what only resuming takes."""
    parser = argparse.ArgumentParser(prog="python -m examples.sample_run", description=__doc__)
    parser.add_argument("--out", type=Path, default=SAMPLE, help=f"where the run goes (default: {SAMPLE})")
    out = parser.parse_args(arguments).out
    torch.set_num_threads(1)  # is recorded, and what replays the run uses as many
    with tempfile.TemporaryDirectory() as directory:
        model = train(Path(directory) / "run.zarr")
        if (out / "commit.json").is_file():
            shutil.rmtree(out)
        explaind.open_run(Path(directory) / "run.zarr").export(out)
    digits = sample_digits()
    read = model(digits.test_images).argmax(dim=1)
    print(explaind.open_run(out))
    print(f"test accuracy {float((read == digits.test_labels).float().mean()):.1%} on {len(read)} images")


if __name__ == "__main__":
    main()
