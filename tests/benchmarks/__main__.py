"""Measure into `results.json`, or write the page and its pictures from it."""

from __future__ import annotations

import argparse
import sys

import matplotlib as mpl
import torch

from tests.benchmarks.page import PAGE, PICTURES, page
from tests.benchmarks.plots import draw
from tests.benchmarks.results import BENCHMARKS, measure, read
from tests.benchmarks.sizes import FULL


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; plots; or nothing for all of these")
    names = parser.parse_args().names or [*BENCHMARKS, "plots"]
    if unknown := [name for name in names if name not in {*BENCHMARKS, "plots"}]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)} and plots")
    torch.set_num_threads(1)
    for name in names:
        sys.stderr.write(f"{name} …\n")
        if name == "plots":
            mpl.use("Agg")
            draw(read(), PICTURES)
            PAGE.write_text(page(read()))
        else:
            measure(name, FULL)


if __name__ == "__main__":
    main()
