"""A directory of results, each computed once, kept, and read again: what was begun and stopped goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import xarray as xr

import explaind
from explaind.stream import write_dataset

from .decompose import open_study
from .phases import Phases, find_phases
from .recipe import Recipe
from .sizes import Sizes
from .task import Split
from .training import train

__all__ = ["Study"]


@dataclass(frozen=True)
class Study:
    """One recipe's run and what was made of it, in one directory.

    Each kind of result has a method that takes its name and the function that computes it. The function is called only
    if the result is not there yet, and the result appears under its name once it is whole.
    """

    recipe: Recipe
    sizes: Sizes
    directory: Path
    progress: bool = True
    _own_seconds: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    """Of every result that was computed in this process."""

    def prepare(self, *, fresh: bool) -> None:
        """Make the directory, or check that it belongs to the same recipe and sizes.

        Raises:
            ValueError: it holds a study of another recipe, or something else.
        """
        mark, own = self.directory / "recipe.txt", f"{self.recipe}\n{self.sizes}\n"
        if fresh and mark.is_file():
            shutil.rmtree(self.directory)
        if mark.is_file() and mark.read_text() != own:
            raise ValueError(
                f"{self.directory} holds a study of another recipe or size. Choose another --out, or give --fresh."
            )
        if not mark.is_file() and self.directory.is_dir() and any(self.directory.iterdir()):
            raise ValueError(f"{self.directory} has files that are not a study's. Choose another --out.")
        self.directory.mkdir(parents=True, exist_ok=True)
        mark.write_text(own)

    @cached_property
    def split(self) -> Split:
        """Training and validation pairs."""
        return self.recipe.make_split()

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Losses and accuracies before every step and after the last; trains the recipe if that is not done."""
        curves = self.table(
            "curves", lambda: train(self.recipe, self.directory / "run.zarr", progress=self.progress).reset_index()
        )
        return curves.set_index("step")

    @cached_property
    def phases(self) -> Phases:
        """When the network memorised and when it generalised.

        Raises:
            ValueError: it did not.
        """
        return find_phases(self.curves)

    @cached_property
    def run(self) -> explaind.Run:
        """The recorded run, with the study's layer groups."""
        _ = self.curves
        return open_study(self.recipe, self.directory / "run.zarr")

    def table(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table of observations, as `name.csv`."""
        path = self.directory / f"{name}.csv"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            self._timed(name, lambda: compute().to_csv(partial, index=False))
            partial.rename(path)
        return pd.read_csv(path)

    def dataset(self, name: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """Arrays with named axes, as `name.zarr`, read when they are used."""
        path = self.directory / f"{name}.zarr"
        if not path.is_dir():
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            self._timed(name, lambda: write_dataset(partial, compute()))
            partial.rename(path)
        kept: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
        return kept

    def attribution(self, name: str, compute: Callable[[Path], explaind.Attribution]) -> explaind.Attribution:
        """A decomposition, as `name.zarr`; its function writes it there with `out=` and checks that it closes."""
        path = self.directory / f"{name}.zarr"
        if not path.is_dir():
            unchecked = self.directory / f"{name}.unchecked.zarr"
            for left in (unchecked, unchecked.with_name(f"{unchecked.name}.partial")):
                shutil.rmtree(left, ignore_errors=True)
            self._timed(name, lambda: compute(unchecked).check())
            unchecked.rename(path)
        return explaind.Attribution.open(path)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time that each result took, without those that it needs, and beside others that are computed at once."""
        path = self.directory / "seconds.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        whole = [line for line in lines if line.endswith("}")]  # not what a full disk has cut off
        return {name: seconds for line in whole for name, seconds in json.loads(line).items()}

    def _timed(self, name: str, work: Callable[[], object]) -> None:
        start, first = time.perf_counter(), len(self._own_seconds)
        work()
        # Without those of other results, which were computed on the way.
        own = time.perf_counter() - start - sum(self._own_seconds[first:])
        self._own_seconds.append(own)
        with (self.directory / "seconds.jsonl").open("a") as file:  # in one write, as other processes add theirs
            file.write("\n" + json.dumps({name: own}))
