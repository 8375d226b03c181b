import dataclasses
import itertools
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explaind
import explaind.store
from explaind.damage import find_damage
from explaind.errors import DamagedStoreError, StoreExistsError, StoreFormatError, VerificationError
from explaind.store import StoreReader
from tests.cases import BY_NAME, chunks_of, mlp, query, record
from tests.random_models import MODELS
from tests.test_calls import Last
from tests.test_random_runs import OPTIMIZERS, loops
from tests.test_random_runs import recorded as any_run
from tests.traced import (
    FEATURES,
    LABELS,
    batchnorm_mlp,
    change_attributes,
    forget_chunks,
    recorded,
    same,
    three_steps,
)
from tests.unfreezing import frozen_backbone, unfreeze

STEPS = 5
DRAWS = int(os.environ.get("EXPLAIND_DRAWS", "12"))


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


def with_penalty(model, optimizer, recorder):
    """Gradients and parameters that no recorded call explains, from the third step on."""
    for step in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(FEATURES[step:][:4]), LABELS[:4]).backward()
        if step == 2:
            model[0].weight.grad.add_(0.1)
        optimizer.step()
        if step == 3:
            with torch.no_grad():
                model[0].weight[0, 0] += 1


def stored(path, name):
    return zarr.open_group(path, mode="r")[name][:].tolist()


@pytest.mark.parametrize("every", [2, 3, 10])
def test_a_run_is_thinned(whole, every, tmp_path):
    run, make = whole
    run.export(tmp_path / "thin.zarr", every=every)
    thin = explaind.open_run(tmp_path / "thin.zarr", model=make())
    assert thin.snapshot_every == every
    assert stored(thin.path, "snapshot_step") == [*range(0, run.num_steps, every), run.num_steps]
    assert "gradient" not in zarr.open_group(thin.path, mode="r")
    check_same(thin, run, 0)
    check_whole(thin.path)
    assert thin.verify().bit_exact


def test_a_thinned_run_is_cut_and_thinned_further(tmp_path):
    run = recorded(tmp_path / "run.zarr", epochs, make=batchnorm_mlp, snapshot_every=2)[0]
    for first, stop, every in [(1, 5, None), (2, 4, None), (0, 6, 4), (1, 6, 3)]:
        path = tmp_path / f"{first}-{stop}-{every}.zarr"
        run.export(path, steps=slice(first, stop), every=every)
        part = explaind.open_run(path, model=batchnorm_mlp())
        check_same(part, run, first)
        check_whole(path)
        assert {0, stop - first} <= set(stored(path, "snapshot_step")) & set(stored(path, "state_step"))
    assert stored(tmp_path / "1-6-3.zarr", "snapshot_step") == [0, 3, 5]
    assert stored(tmp_path / "1-5-None.zarr", "snapshot_step") == [0, 1, 3, 4]


def test_what_a_replay_does_not_give_stays(tmp_path):
    run = recorded(tmp_path / "run.zarr", with_penalty)[0]
    run.export(tmp_path / "thin.zarr", every=5)
    thin = explaind.open_run(tmp_path / "thin.zarr", model=mlp())
    assert stored(thin.path, "snapshot_step") == [0, 4, 5]
    assert stored(thin.path, "gradient_step") == [2, 3]
    check_same(thin, run, 0)
    thin.export(tmp_path / "less.zarr", steps=slice(1, 4))
    less = explaind.open_run(tmp_path / "less.zarr", model=mlp())
    assert stored(less.path, "gradient_step") == [1, 2]
    check_same(less, run, 1)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("first, stop", [(0, 5), (1, 3), (2, 5), (4, 5)])
def test_parameters_that_came_later(first, stop, every, tmp_path):
    def thaw(model, optimizer, recorder):
        for step in range(STEPS):
            if step == 3:
                unfreeze(model, optimizer, lr=0.01)
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[step:][:4]), LABELS[step:][:4]).backward()
            optimizer.step()

    def adamw(model):
        return torch.optim.AdamW(model[2].parameters(), lr=0.02)

    run = recorded(tmp_path / "run.zarr", thaw, make=frozen_backbone, optimizer=adamw, snapshot_every=every or 4)[0]
    run.export(tmp_path / "part.zarr", steps=slice(first, stop), every=every)
    part = explaind.open_run(tmp_path / "part.zarr", model=frozen_backbone())
    check_same(part, run, first)
    check_whole(part.path)


def test_a_store_of_format_2_is_thinned(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format-2.zarr.zip") as archive:
        archive.extractall(tmp_path)

    def opened(name):
        layers = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 3)
        return explaind.open_run(tmp_path / name, model=nn.Sequential(*layers))

    run = opened("format-2.zarr")
    run.export(tmp_path / "part.zarr", steps=slice(1, 4))
    run.export(tmp_path / "thin.zarr", steps=slice(1, 4), every=2)
    for name in ("part.zarr", "thin.zarr"):
        check_same(opened(name), run, 1)
        check_whole(tmp_path / name)
    assert opened("part.zarr").info().format_version == 2
    assert opened("thin.zarr").info().format_version == explaind.store.FORMAT_VERSION
    assert "steps:     3 (parameters stored before one in 2)" in str(opened("thin.zarr").info())


def test_thinning_takes_the_model_and_updates_that_replay(tmp_path):
    class Own(torch.optim.SGD):
        pass

    record(BY_NAME["sgd"], tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="this needs the model"):
        explaind.open_run(tmp_path / "run.zarr").export(tmp_path / "thin.zarr", every=2)
    own = recorded(tmp_path / "own.zarr", three_steps, optimizer=lambda model: Own(model.parameters(), lr=0.1))[0]
    with pytest.raises(StoreFormatError, match=r"updates of .*Own cannot be replayed.*export the run without every="):
        own.export(tmp_path / "thin.zarr", every=2)
    own.export(tmp_path / "part.zarr", steps=slice(1, 3))
    check_same(explaind.open_run(tmp_path / "part.zarr", model=mlp()), own, 1)
    for every in (0, 1, 2.0):
        with pytest.raises(ValueError, match="every= is a number of steps, at least 2"):
            own.export(tmp_path / "thin.zarr", every=every)


def test_what_replays_to_other_bits_than_were_recorded_is_refused(tmp_path):
    recorded(tmp_path / "run.zarr", epochs, make=batchnorm_mlp, snapshot_every=4)
    change_attributes(tmp_path / "run.zarr", lambda attributes: attributes.update(machine="another"))
    store = zarr.open_group(tmp_path / "run.zarr")
    store["digest"][2] = store["digest"][2] + 1
    forget_chunks(tmp_path / "run.zarr")
    run = explaind.open_run(tmp_path / "run.zarr", model=batchnorm_mlp())
    for options in ({"steps": slice(2, 6)}, {"steps": slice(1, 6), "every": 4}):
        with pytest.raises(VerificationError, match=r"'0\.weight' before step 2 has to be replayed, which gives other"):
            run.export(tmp_path / "part.zarr", **options)
    run.export(tmp_path / "part.zarr", steps=slice(4, 6))
    check_same(explaind.open_run(tmp_path / "part.zarr", model=batchnorm_mlp()), run, 4)


@settings(max_examples=DRAWS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    choice=st.one_of(*OPTIMIZERS.values()),
    loop=loops,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    recorded_every=st.sampled_from([1, 1, 2]),
    ends=st.tuples(st.integers(0, 3), st.integers(1, 4)),
    every=st.sampled_from([None, 2, 3]),
)
def test_any_stretch_of_any_run_is_the_same(name, choice, loop, dtype, recorded_every, ends, every):
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gradients with a penalty or noise are stored
        run, _ = any_run(directory, name, choice, loop, dtype, snapshot_every=recorded_every)
        first = min(ends[0], run.num_steps - 1)
        stop = min(max(ends[1], first + 1), run.num_steps)
        path = Path(directory) / "part.zarr"
        run.export(path, steps=slice(first, stop), every=every)
        check_same(explaind.open_run(path, model=run.model), run, first)
        check_whole(path)
