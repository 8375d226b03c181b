"""Figures in files, with the data that they show beside them."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from explaind.recording.files import put
from explaind.recording.replacing import another
from explaind.stream import write_dataset

__all__ = ["Data", "save_figure"]

Data = pd.DataFrame | xr.DataArray | xr.Dataset
"""What a figure may show."""


def save_figure(figure: Figure, path: str | Path, *, data: Data | dict[str, Data]) -> list[Path]:
    """Write a figure as PNG and SVG, and beside it the data that it shows; what is there is replaced.

    Frames and arrays of one or two axes become CSV, one observation per row; larger ones become zarr stores. Every file
    and store is written under another name first, so that it is whole if it is there. The same figure gives the same
    SVG.

    Args:
        figure: what is drawn.
        path: of the files, without their endings; its directory is made.
        data: what it shows; several by name, which is put after that of the figure.

    Returns:
        The files and stores.

    Raises:
        TypeError: data of another type.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> written = save_figure(plt.figure(), store.parent / "empty", data=pd.DataFrame({"step": [0]}))
        >>> [path.name for path in written]
        ['empty.png', 'empty.svg', 'empty.csv']
    """
    stem = Path(path)
    parts = {f"-{name}": part for name, part in data.items()} if isinstance(data, dict) else {"": data}
    for part in parts.values():
        if not isinstance(part, Data):
            raise TypeError(f"a figure's data are pandas frames or xarray objects; got {type(part).__name__}.")
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for ending in ("png", "svg"):
        written.append(stem.with_name(f"{stem.name}.{ending}"))
        with mpl.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "none"}), io.BytesIO() as buffer:
            figure.savefig(buffer, format=ending, dpi=150, metadata={"Date": None} if ending == "svg" else None)
            put(str(written[-1]), buffer.getvalue())
    return written + [_save_data(part, stem.with_name(stem.name + name)) for name, part in parts.items()]


def _save_data(data: Data, stem: Path) -> Path:
    if isinstance(data, pd.DataFrame) or len(data.dims) <= 2:
        file = stem.with_name(f"{stem.name}.csv")
        put(str(file), _table(data).encode())
        return file
    store = stem.with_name(f"{stem.name}.zarr")
    with another(store, durable=False) as beside:
        write_dataset(beside, data if isinstance(data, xr.Dataset) else data.to_dataset(name=data.name or "value"))
    return store


def _table(data: Data) -> str:
    """One observation per row; a plain range of row numbers is left out."""
    if isinstance(data, pd.DataFrame):
        return data.to_csv(index=data.index.names != [None])
    frame = data.to_dataframe() if isinstance(data, xr.Dataset) else data.to_dataframe(name=str(data.name or "value"))
    return frame.reset_index().to_csv(index=False)
