import dataclasses
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import nn

import explaind
from explaind.damage import find_damage
from explaind.errors import DamagedStoreError, StoreExistsError
from explaind.store import StoreReader
from tests.cases import BY_NAME, chunks_of, mlp, query, record
from tests.test_calls import Last
from tests.traced import FEATURES, LABELS, batchnorm_mlp, recorded, same, three_steps

STEPS = 5


def ways(model, optimizer, recorder):
    """Calls in two ways and of two shapes, some inputs again, and two calls in a step."""
    longer = torch.cat([torch.ones(9, 2, dtype=torch.float64), FEATURES], dim=1)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = longer[2 * step % 5 :][:3] if step % 2 else FEATURES[step:][:4]
        F.cross_entropy(model(x, 1.0 + step % 3), LABELS[: len(x)]).backward()
        if step == 3:
            F.cross_entropy(model(FEATURES[1:2]), LABELS[:1]).backward()
        optimizer.step()


def epochs(model, optimizer, recorder):
    for _ in range(2):
        three_steps(model, optimizer, recorder)


RUNS = {
    "ways": (Last, lambda path: recorded(path, ways, make=Last)[0]),
    "buffers": (batchnorm_mlp, lambda path: recorded(path, epochs, make=batchnorm_mlp)[0]),
    "gradients": (mlp, lambda path: record(BY_NAME["adamw-schedule"], path, example_grads="stored")[0]),
}


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory):
    make, recording = RUNS[request.param]
    with pytest.MonkeyPatch.context() as monkeypatch:
        chunks_of(monkeypatch, 400)
        return recording(tmp_path_factory.mktemp("whole") / "run.zarr"), make


def plain(call):
    """A call without its place among all calls."""
    kept = dataclasses.asdict(call) | {"rows": call.rows.stop - call.rows.start, "fixed_version": None}
    return {name: torch.from_numpy(part) if isinstance(part, np.ndarray) else part for name, part in kept.items()}


def check_same(part, run, first):
    """Every step of a part is that of the run, bit for bit."""
    for step in range(part.num_steps):
        old = first + step
        assert torch.equal(part.flat_gradient(step), run.flat_gradient(old))
        assert part.updated[step].tolist() == run.updated[old].tolist()
        assert part.gradient_rescaling(step) == run.gradient_rescaling(old)
        assert all(same(part.settings(step, group), run.settings(old, group)) for group in range(run.num_groups))
        assert len(part.calls(step)) == len(run.calls(old))
        for own, other in zip(part.calls(step), run.calls(old), strict=True):
            assert same(plain(own), plain(other))
            assert same(part.fixed_version(own.fixed_version), run.fixed_version(other.fixed_version))
            if run.stores_example_grads:
                assert torch.equal(part.stored_example_grads(own.rows), run.stored_example_grads(other.rows))
    for step in range(part.num_steps + 1):
        assert torch.equal(part.flat_params(step), run.flat_params(first + step))
        assert same(part.state(step), run.state(first + step))
        assert same(part.fixed(step), run.fixed(first + step))
    assert part.history.equals(run.history[first : first + part.num_steps].reset_index(drop=True).rename_axis("step"))


def check_whole(path):
    """A complete store by its specification."""
    commit, store = json.loads((path / "commit.json").read_text()), zarr.open_group(path, mode="r")
    assert commit["complete"]
    for name in commit["arrays"]:
        assert store[name].shape[0] == commit["lengths"][store[name].metadata.dimension_names[0]]
    assert not list(find_damage(StoreReader(path)))
    assert not explaind.open_run(path).info().leftovers


def test_a_stretch_of_a_run_is_a_run(whole, tmp_path):
    run, make = whole
    for first, stop in itertools.combinations([0, 1, 3, run.num_steps - 1, run.num_steps], 2):
        path = tmp_path / f"{first}-{stop}.zarr"
        run.export(path, steps=slice(first, stop))
        part = explaind.open_run(path, model=make())
        assert part.num_steps == stop - first
        assert part.metadata["exported_from"] == {"run": "run.zarr", "steps": [first, stop]}
        check_same(part, run, first)
        check_whole(path)
        assert part.verify().bit_exact


def test_only_the_inputs_that_are_used_are_taken(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", ways, make=Last)
    run.export(tmp_path / "part.zarr", steps=slice(3, 5))
    store = zarr.open_group(tmp_path / "part.zarr", mode="r")
    assert store["inputs/0"].shape[0] == 1 + 4
    assert store["inputs-1/0"].shape[0] == 3
    assert store["row_input"][:].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_part_explains_what_happened_in_it(tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    run.export(tmp_path / "part.zarr", steps=range(2, 6))
    part = explaind.open_run(tmp_path / "part.zarr", model=mlp())
    by = ("query", "example", "step", "layer")
    found, known = part.attribute(query(), by=by), run.attribute(query(), by=by, steps=range(2, 6))
    assert found.check().other < 1e-12
    np.testing.assert_allclose(
        found.dataset.contribution, known.dataset.contribution.sel(example=part.examples), rtol=1e-9, atol=1e-15
    )


def test_a_part_of_a_part_and_of_checkpoints(tmp_path):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    run.export(tmp_path / "part.zarr", steps=slice(1, None))
    explaind.open_run(tmp_path / "part.zarr").export(tmp_path / "less.zarr", steps=slice(None, -2))
    check_same(explaind.open_run(tmp_path / "less.zarr", model=mlp()), run, 1)
    points = explaind.from_checkpoints([run.params(step) for step in range(7)], mlp(), steps=range(0, 70, 10))
    points.export(tmp_path / "points.zarr", steps=slice(2, 4))
    part = explaind.open_run(tmp_path / "points.zarr", model=mlp())
    assert part.checkpoints == [20, 30, 40]
    assert torch.equal(part.flat_params(0), run.flat_params(2))


def test_stores_of_format_1_are_exported_as_such(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format-1.zarr.zip") as archive:
        archive.extractall(tmp_path)

    def opened(name):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
        return explaind.open_run(tmp_path / name, model=model)

    opened("format-1.zarr").export(tmp_path / "part.zarr", steps=slice(2, 5))
    part = opened("part.zarr")
    check_same(part, opened("format-1.zarr"), 2)
    check_whole(part.path)


@pytest.mark.parametrize(
    "steps", [slice(0, 7), slice(3, 3), slice(4, 2), slice(0, 4, 2), slice(None, None, -1), range(2, 9), range(-2, 2)]
)
def test_steps_that_are_no_stretch_of_the_run_are_refused(steps, tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=r"steps= are successive ones out of 0 to 5, such as slice\(0, 6\); got "):
        run.export(tmp_path / "part.zarr", steps=steps)
    assert not (tmp_path / "part.zarr").exists()


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    with pytest.raises(StoreExistsError):
        run.export(run.path)
    (file,) = (file for file in (run.path / "gradient" / "c").rglob("*") if file.is_file())
    file.write_bytes(b"")
    with pytest.raises(DamagedStoreError, match="'gradient'"):
        explaind.open_run(run.path).export(tmp_path / "part.zarr")
    assert [file.name for file in tmp_path.iterdir()] == ["run.zarr"]
