"""Figures are saved with the data that they show, whole or not at all."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from explaind.plots import save_figure


@pytest.fixture
def figure():
    figure, ax = plt.subplots()
    ax.plot([0, 1], [2, 3])
    yield figure
    plt.close(figure)


def test_a_frame_comes_back_as_it_was(figure, tmp_path):
    frame = pd.DataFrame({"step": [0, 1], "loss": [1 / 3, 2.0]})
    written = save_figure(figure, tmp_path / "new" / "curves", data=frame)
    assert [path.name for path in written] == ["curves.png", "curves.svg", "curves.csv"]
    assert all(path.is_file() for path in written)
    pd.testing.assert_frame_equal(pd.read_csv(written[2]), frame)
    assert written[0].read_bytes().startswith(b"\x89PNG")
    indexed = frame.set_index("step")
    pd.testing.assert_frame_equal(
        pd.read_csv(save_figure(figure, tmp_path / "i", data=indexed)[2], index_col="step"), indexed
    )


def test_small_arrays_are_tables_with_a_row_per_entry(figure, tmp_path):
    share = xr.DataArray([[1.0, 2.0]], {"step": [7], "layer": ["a", "b"]}, ["step", "layer"], name="share")
    written = save_figure(figure, tmp_path / "shares", data={"shares": share, "sizes": share.to_dataset()})
    assert [path.name for path in written[2:]] == ["shares-shares.csv", "shares-sizes.csv"]
    for path in written[2:]:
        assert pd.read_csv(path).to_dict("list") == {"step": [7, 7], "layer": ["a", "b"], "share": [1.0, 2.0]}


def test_larger_arrays_are_stores(figure, tmp_path):
    cube = xr.DataArray(np.arange(8.0).reshape(2, 2, 2), {"layer": ["a", "b"]}, ["layer", "query", "other"], name="sim")
    for values in (cube, cube + 1):
        path = save_figure(figure, tmp_path / "cube", data=values)[2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cube.png", "cube.svg", "cube.zarr"]
    opened = xr.open_zarr(path, consolidated=False)["sim"]
    np.testing.assert_array_equal(opened, cube + 1)
    assert opened["layer"].values.tolist() == ["a", "b"]


def test_the_same_figure_gives_the_same_svg(figure, tmp_path):
    data = pd.DataFrame({"x": [1]})
    first, second = (save_figure(figure, tmp_path / name / "f", data=data)[1].read_bytes() for name in "ab")
    assert first == second


def test_an_earlier_figure_stays_if_a_new_one_cannot_be_written(figure, tmp_path, monkeypatch):
    path = save_figure(figure, tmp_path / "f", data=pd.DataFrame({"x": [1]}))[0]
    before = path.read_bytes()
    monkeypatch.setattr(type(figure), "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        save_figure(figure, tmp_path / "f", data=pd.DataFrame({"x": [2]}))
    assert path.read_bytes() == before
    assert pd.read_csv(tmp_path / "f.csv")["x"].tolist() == [1]


def test_data_of_another_type_are_refused(figure, tmp_path):
    with pytest.raises(TypeError, match="pandas frames or xarray objects; got list"):
        save_figure(figure, tmp_path / "f", data=[1, 2])
    assert not list(tmp_path.iterdir())
