"""The result of a decomposition: labelled terms, and the certificate that they sum to the prediction."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
import xarray as xr

from explaind.errors import ClosureError, StoreFormatError, UnattributedWarning
from explaind.places import Place, place_of
from explaind.stream import new_store, write_dataset
from explaind.sums import sums

if TYPE_CHECKING:
    from explaind.plots.accessor import AttributionPlots

__all__ = ["TERMS", "Attribution", "Closure"]

TERMS = ("contribution", "decay", "other", "rounding")
"""The terms that carry the axes of a decomposition."""

_MUCH = 1e-3
"""Of the path: more than this in `other` is warned about."""


@dataclass(frozen=True, kw_only=True)
class Closure:
    """How well the terms of a decomposition sum to the prediction; worst query of each."""

    error: float
    """|prediction − sum of all terms|, relative to the summed absolute terms."""
    error_limit: float
    """Largest `error` that passes."""
    quadrature: float
    """|summed quadrature term|, relative to the length of the query's path Σ_s |q(θ_{s+1}) − q(θ_s)|."""
    quadrature_limit: float
    """Largest `quadrature` that passes."""
    other: float
    """Summed absolute `other` terms relative to the path length: what no recorded example accounts for."""
    rounding: float
    """Summed absolute `rounding` terms relative to the path length: floating-point error of the training."""

    @property
    def passed(self) -> bool:
        """Whether both are within their limits (a NaN is not)."""
        return self.error <= self.error_limit and self.quadrature <= self.quadrature_limit

    def __str__(self) -> str:
        return (
            f"sum of terms differs from the prediction by {self.error:.1e} (limit {self.error_limit:.0e}); "
            f"of the path, quadrature error is {self.quadrature:.1e} (limit {self.quadrature_limit:.0e}), "
            f"rounding {self.rounding:.1e}, other {self.other:.1e}"
        )


class Attribution:
    """A prediction as a sum of labelled terms; made by `run.attribute`.

    `initial + Σ contribution + Σ decay + Σ other + Σ rounding + Σ quadrature (+ omitted) = prediction`, per query.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset
        """The terms as an `xarray.Dataset`; see `explaind.Run.attribute` for its variables."""
        self._stored: Place | None = None

    @property
    def total(self) -> xr.DataArray:
        """Sum of all terms, `[query]`; equals `dataset.prediction` up to the closure error."""
        return self._totals()[0]

    @property
    def closure(self) -> Closure:
        """The certificate: how far the terms are from summing to the prediction."""
        data = self.dataset
        total, terms = self._totals()
        size = sum((absolute for _, absolute in terms.values()), start=np.abs(data.prediction))
        error = np.abs(total - data.prediction) / size.where(size > 0, 1.0)
        path = data.path_length.where(data.path_length > 0, 1.0)

        def share(term: xr.DataArray) -> float:
            return float((np.abs(term) / path).max(skipna=False))

        return Closure(
            error=float(error.max(skipna=False)),
            error_limit=1e-12,
            quadrature=share(terms["quadrature"][0]),
            quadrature_limit=max(float(data.attrs["tolerance"]), 1e-12),
            other=share(terms["other"][1]),
            rounding=share(terms["rounding"][1]),
        )

    def check(self, *, tolerance: float | None = None) -> Closure:
        """Raise unless the terms sum to the prediction and the quadrature error is within tolerance.

        The sum closes whatever is in the term `other`; more than a thousandth of the path there is warned about.

        Args:
            tolerance: largest quadrature error to accept, as a part of the query's path length; by default the
                one that was given to `run.attribute`.

        Raises:
            ClosureError: they do not, or it is not.

        Warns:
            UnattributedWarning: much of the path is in `other`, so the contributions are not the whole story.
        """
        closure = self.closure
        if tolerance is not None:
            closure = replace(closure, quadrature_limit=tolerance)
        if not closure.error <= closure.error_limit:
            raise ClosureError(f"the decomposition does not close: {closure}.")
        if not closure.passed:
            single = self.dataset.attrs.get("dtype") == "float32"
            better = "dtype=torch.float64" if single else "explaind.quadrature.adaptive(max_depth=…)"
            raise ClosureError(
                f"the path integral, by {self.dataset.attrs['quadrature']}, is not accurate enough: {closure}. Accept "
                f"it with check(tolerance=…), or attribute again with {better}."
            )
        if not closure.other <= _MUCH:
            warnings.warn(
                f"{closure.other:.1%} of the path is in the term 'other': gradient or movement that no recorded "
                "example accounts for. A penalty on the parameters, injected noise, weights changed by hand or "
                "momentum from before the recording belong there; if the loop has none of these, the gradient that the "
                "optimizer used is not that of the recorded calls (gradients kept from earlier steps or edited between "
                "backward passes, say), and run.verify() tells at which step.",
                UnattributedWarning,
                stacklevel=2,
            )
        return closure

    def top(self, num: int = 10) -> pd.DataFrame:
        """The examples (or groups) that raised and lowered each query most, summed over all other axes.

        Args:
            num: how many of each, per query.

        Raises:
            ValueError: the result has no example axis, or `num` is not positive.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}.")
        axis = self._example_axis()
        (summed,) = sums(self.dataset.contribution, ("query", axis), np.positive)
        frames = []
        for place, query in enumerate(self.dataset.indexes["query"] if "query" in summed.dims else [None]):
            scores = (summed if query is None else summed.isel(query=place)).to_series().sort_values()
            ends = {"raised": scores[scores > 0].iloc[::-1][:num], "lowered": scores[scores < 0][:num]}
            for direction, best in ends.items():
                frame = best.rename("contribution").rename_axis(axis).reset_index()
                frame.insert(0, "rank", range(1, len(frame) + 1))
                frame.insert(0, "direction", direction)
                if query is not None:
                    frame.insert(0, "query", query)
                frames.append(frame)
        table: pd.DataFrame = pd.concat(frames, ignore_index=True)
        return table

    def save(self, path: str | Place) -> None:
        """Write the dataset to a new zarr store.

        Raises:
            StoreExistsError: something is at `path` already.
        """
        with new_store(place_of(path)) as unfinished:
            write_dataset(unfinished, self.dataset)

    @classmethod
    def open(cls, path: str | Place) -> Self:
        """Read a result that `save` or `run.attribute(…, out=)` wrote; arrays are read when they are used.

        Raises:
            StoreFormatError: it is no result, or not a whole one.
        """
        try:
            dataset = xr.open_zarr(str(place_of(path)), consolidated=False, chunks=None)
        except FileNotFoundError as error:
            raise StoreFormatError(f"{path} is not a stored result: there is no zarr group.") from error
        if missing := [name for name in (*TERMS, "prediction") if name not in dataset]:
            raise StoreFormatError(
                f"{path} is not a stored result, or not a whole one: it has no {missing[0]!r}. Expected a directory "
                "written by result.save(path) or run.attribute(…, out=path)."
            )
        result = cls(dataset)
        result._stored = place_of(path)
        return result

    @property
    def plot(self) -> AttributionPlots:
        """Figures of this result: `plot.layers()`, `plot.steps()`, `plot.examples(query=…)`, `plot.kernel()`, ….

        All are methods of `explaind.plots.accessor.AttributionPlots`.
        """
        from explaind.plots.accessor import AttributionPlots

        return AttributionPlots(self)

    def _example_axis(self) -> str:
        for axis in ("example", "group"):
            if axis in self.dataset.contribution.dims:
                return axis
        raise ValueError(
            f"this result has no example axis, its axes are {self.dataset.contribution.dims}. Ask for it: "
            "run.attribute(query, by=('query', 'example'))."
        )

    def _totals(self) -> tuple[xr.DataArray, dict[str, tuple[xr.DataArray, xr.DataArray]]]:
        """The sum of all terms `[query]`, and of each the sum of its entries and of their absolute values."""
        terms = {}
        for name in (*TERMS, "quadrature", "initial", "omitted"):
            signed, absolute = sums(self.dataset[name], ("query",), np.positive, np.abs)
            terms[name] = signed, absolute
        return sum((signed for signed, _ in terms.values()), start=xr.DataArray(0.0)), terms

    def __repr__(self) -> str:
        data = self.dataset
        axes = ", ".join(f"{name}: {size}" for name, size in data.contribution.sizes.items())
        return f"<Attribution of {data.attrs['output']} ({axes})>\n{self._state}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._state)}</p>{self.dataset._repr_html_()}"

    @property
    def _state(self) -> str:
        # To look at a result must not read all of a store.
        return str(self.closure) if self._stored is None else f"stored at {self._stored}; check() reads it whole"
