"""Which training digits made a residual network read a test digit as it does?"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import explaind

RAISED, LOWERED = "#0072B2", "#D55E00"


class Digits(NamedTuple):
    """Images `[image, 1, 8, 8]` between 0 and 1, and their labels `[image]`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(num_train: int, seed: int) -> Digits:
    """Scikit-learn's 1,797 handwritten digits, split at random; training images beyond `num_train` are left out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("this example reads its images from scikit-learn: pip install scikit-learn")
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.from_numpy(data.images[order] / 16).float()[:, None]
    labels = torch.from_numpy(data.target[order]).long()
    return Digits(images[:-360][:num_train], labels[:-360][:num_train], images[-360:], labels[-360:])


def convolution(channels_in: int, channels_out: int, *, norm: bool) -> list[nn.Module]:
    """Convolution, normalisation if wanted, ReLU."""
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=not norm)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return [layer, *([nn.BatchNorm2d(channels_out)] if norm else []), nn.ReLU()]


class Residual(nn.Module):
    """x + block(x) of two convolutions."""

    def __init__(self, channels: int, *, norm: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *convolution(channels, channels, norm=norm), *convolution(channels, channels, norm=norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[image, channel, row, column]` to the same shape."""
        changed: Tensor = x + self.block(x)
        return changed


def make_model(width: int, *, norm: bool) -> nn.Sequential:
    """The nine layers of ResNet-9 for images of 8 × 8: eight convolutions and a linear layer."""
    return nn.Sequential(
        nn.Sequential(*convolution(1, width, norm=norm)),
        nn.Sequential(*convolution(width, 2 * width, norm=norm), nn.MaxPool2d(2), Residual(2 * width, norm=norm)),
        nn.Sequential(*convolution(2 * width, 4 * width, norm=norm), nn.MaxPool2d(2)),
        nn.Sequential(*convolution(4 * width, 4 * width, norm=norm), Residual(4 * width, norm=norm), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def train(digits: Digits, options: argparse.Namespace) -> None:
    """A usual loop, traced."""
    model = make_model(options.width, norm=options.batchnorm)
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), options.batch_size, shuffle=True)
    optimizer = SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    total = options.epochs * len(loader)
    scheduler = LambdaLR(optimizer, lambda step: float(np.interp(step + 1, [0, total / 4, total + 1], [0, 1, 0])))
    with explaind.trace(model, optimizer, options.out / "run.zarr", overwrite=True) as recorder:
        for _ in range(options.epochs):
            for images, labels in recorder.batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                scheduler.step()


def trained_model(options: argparse.Namespace) -> tuple[explaind.Run, nn.Module]:
    """The recorded run, with the stages of the network as its layers, and the model with the last weights."""
    model = make_model(options.width, norm=options.batchnorm)
    run = explaind.open_run(options.out / "run.zarr", model=model)
    model.load_state_dict(run.params(run.num_steps) | run.fixed(run.num_steps))
    stages = ["first convolution", "stage 1", "stage 2", "stage 3", "linear layer"]
    run.layers = {
        stage: [name for name in run.table.names if name.startswith(f"{number}.")]
        for number, stage in enumerate(stages)
    }
    return run, model.eval()


def attribute(run: explaind.Run, query: explaind.Query, options: argparse.Namespace) -> explaind.Attribution:
    """Training image × layer, with gradients in the type of the training; the certificate is float64."""
    return run.attribute(
        query,
        by=("query", "example", "layer"),
        tolerance=options.tolerance,
        dtype=torch.float32,
        progress=True,
    )


def draw(digits: Digits, chosen: Tensor, predicted: Tensor, result: explaind.Attribution) -> Figure:
    """Test digits beside the training digits that raised and lowered their margins most; shares of the layers."""
    num, num_shown = len(chosen), 4
    figure = plt.figure(figsize=(11, 1.75 * num + 3.2), layout="constrained")
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.75 * num, 3.2])
    above.suptitle(
        "The test images that the network finds hardest, and the training images that did most for and against them\n"
        "(numbers: contributions to the margin, the log-odds of the right label, in nats)",
        fontsize="medium",
    )
    table = above.subplots(num, 2 * num_shown + 1, squeeze=False)
    top = result.top(num_shown)
    for row, axes in enumerate(table):
        test = int(chosen[row])
        margin = float(result.dataset.prediction[row])
        draw_digit(axes[0], digits.test_images[test], f"a {digits.test_labels[test]}, read as {predicted[row]}")
        axes[0].set_xlabel(f"margin {margin:+.1f}")
        axes[0].set_ylabel("test image", fontsize="small")
        for column, (direction, colour) in enumerate({"raised": RAISED, "lowered": LOWERED}.items()):
            place = 1 + column * num_shown
            entries = top[(top["query"] == row) & (top["direction"] == direction)]
            for ax, example, contribution in zip(
                axes[place : place + num_shown], entries["example"], entries["contribution"], strict=True
            ):
                draw_digit(ax, digits.train_images[example], f"a {digits.train_labels[example]}")
                ax.set_xlabel(f"{contribution:+.2f}", color=colour)
            axes[place].set_ylabel(f"{direction} it most", color=colour, fontsize="small")
    draw_layers(below, digits, chosen, result)
    return figure


def draw_digit(ax: Axes, image: Tensor, title: str) -> None:
    """An image in ink on paper."""
    ax.imshow(image[0].numpy(), cmap="Greys", vmin=0, vmax=1)
    ax.set_title(title, fontsize="medium")
    ax.set_xticks([])
    ax.set_yticks([])


def draw_layers(figure: SubFigure, digits: Digits, chosen: Tensor, result: explaind.Attribution) -> None:
    """What all training images together did to each margin, through each layer."""
    shares = result.dataset.contribution.sum("example")
    ax = figure.subplots()
    height = 0.8 / len(chosen)
    for row, test in enumerate(chosen.tolist()):
        positions = np.arange(shares.sizes["layer"]) + (row - (len(chosen) - 1) / 2) * height
        hatch = ("", "///", "...", "xxx")[row % 4]
        label = f"row {row + 1}: a {digits.test_labels[test]}"
        ax.barh(positions, shares[row], height, label=label, hatch=hatch, edgecolor="white")
    ax.set_yticks(np.arange(shares.sizes["layer"]), shares.layer.values)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("contribution of all training images through the layer, nats of the margin")
    ax.legend(fontsize="small")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python examples/digits_resnet.py",
        description="Train a small ResNet-9 on scikit-learn's digits, traced, and write the margins of the test images "
        "that it finds hardest as exact sums over training images and layers.",
    )
    parser.add_argument("--out", type=Path, default=Path("storage/digits-resnet"), help="where run and figure go")
    parser.add_argument("--no-batchnorm", dest="batchnorm", action="store_false", help="leave out the normalisation")
    parser.add_argument("--num-train", type=int, default=1437, help="training images to use")
    parser.add_argument("--num-queries", type=int, default=3, help="test images to explain")
    parser.add_argument("--width", type=int, default=8, help="channels of the first convolution")
    parser.add_argument("--epochs", type=int, help="passes over the data (default: 4, without normalisation 8)")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 0.1, without normalisation 0.05)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="quadrature error, as a part of the path's length"
    )
    parser.add_argument("--seed", type=int, default=0, help="split, initial weights and shuffling")
    options = parser.parse_args(arguments)
    options.lr = options.lr or (0.1 if options.batchnorm else 0.05)
    options.epochs = options.epochs or (4 if options.batchnorm else 8)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Train, attribute, check and draw."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small: several threads would mostly wait for each other
    torch.manual_seed(options.seed)
    digits = load_digits(options.num_train, options.seed)
    start = time.monotonic()
    train(digits, options)
    run, model = trained_model(options)
    with torch.no_grad():
        output = model(digits.test_images)
    predicted = output.argmax(dim=1)
    accuracy = float((predicted == digits.test_labels).float().mean())
    print(run)
    print(
        f"test accuracy {accuracy:.1%} on {len(predicted)} images, {time.monotonic() - start:.0f} s with the recording"
    )

    chosen = explaind.outputs.margin(digits.test_labels)(output).argsort()[: options.num_queries]
    query = explaind.Query(digits.test_images[chosen], output=explaind.outputs.margin(digits.test_labels[chosen]))
    start = time.monotonic()
    result = attribute(run, query, options)
    print(f"\nattributed in {time.monotonic() - start:.0f} s by {result.dataset.attrs['example_products']}")
    print(result.check())
    print(result.top(2).to_string(index=False, float_format="{:+.3f}".format))

    figure = draw(digits, chosen, predicted[chosen], result)
    figure.savefig(options.out / "digits.png", dpi=120)
    plt.close(figure)
    print(f"\nwrote {options.out / 'digits.png'}")


if __name__ == "__main__":
    main()
