"""Run the grokking study: `python -m experiments.grokking --recipe quick --out storage/grokking-quick`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from explaind.threads import num_threads

from .ahead import compute_ahead
from .findings import collect, write
from .gallery import draw_all
from .recipes import RECIPES
from .results import Results
from .sizes import PAPER, QUICK
from .study import Study
from .task import TASKS

SIZES = {"quick": QUICK, "paper": PAPER, "quick-positional": QUICK, "positional": PAPER}
"""How much is made of each recipe's run."""


def main(arguments: list[str] | None = None) -> int:
    """Compute and draw what is not there yet, and write the findings."""
    options = parse(arguments)
    recipe, sizes = RECIPES[options.recipe](options.seed, task=options.task), SIZES[options.recipe]
    study = Study(recipe, sizes, options.out, progress=not options.quiet)
    try:
        study.prepare(fresh=options.fresh)
        with num_threads(1):  # what is small is faster so, and no run depends on the number of cores
            if options.processes > 1:
                compute_ahead(study, processes=options.processes)
            print(summary(Results(study)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what was interrupted.", file=sys.stderr)
        return 130
    return 0


def summary(results: Results) -> str:
    """Carry the study out, and say in a few lines what came of it."""
    study = results.study
    draw_all(results, study.directory / "figures")
    found = collect(results)
    write(found, study.directory)
    phases = study.phases
    verdicts = [claim["verdict"] for claim in found["claims"]]
    return (
        f"memorised at step {phases.memorised}, generalised at step {phases.generalised} of {phases.end}\n"
        f"by class:   {results.by_class.closure}\nby example: {results.by_example.closure}\n"
        f"by element: {results.by_element.closure}\n"
        f"of {len(verdicts)} claims of the paper it agrees with {verdicts.count('agrees')}, refines "
        f"{verdicts.count('refines')}, disagrees with {verdicts.count('disagrees')}\n"
        f"read {study.directory / 'findings.md'}, look at {study.directory / 'figures'}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.grokking",
        description="Train a transformer on modular arithmetic until it groks, and decompose what it learned: exactly, "
        "over training examples, steps, layers and parameters. What is done already is not done again.",
    )
    parser.add_argument("--recipe", choices=RECIPES, default="quick", help="what to train (default: quick)")
    parser.add_argument("--task", choices=TASKS, default="addition", help="modular task (default: addition)")
    parser.add_argument("--out", type=Path, required=True, help="directory for the run, results, figures and findings")
    parser.add_argument("--seed", type=int, default=0, help="split, initial weights and shuffling (default: 0)")
    parser.add_argument(
        "--processes",
        type=at_least_one,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        help="how many results are computed at once, each in one thread and a part of the memory (default: one for "
        "each core)",
    )
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run of the study left in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def at_least_one(text: str) -> int:
    """A number of processes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
