import copy
import gc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import explaind
from explaind.damage import find_damage
from explaind.errors import (
    ModelMismatchError,
    NonFiniteError,
    NotRecordedError,
    StoreExistsError,
    UnknownUpdateRuleError,
)
from explaind.store import StoreReader
from tests.cases import BY_NAME, data, mlp, query, record

BY = ("query", "step", "layer")


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()


def states(model, num=4):
    """State dicts of a training, some steps apart."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x, y = data().tensors
    found = []
    for _ in range(num):
        found.append(copy.deepcopy(model.state_dict()))
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return found


def saved(dicts, directory, wrap=lambda state: state):
    files = [directory / f"{number}.pt" for number in range(len(dicts))]
    for file, state in zip(files, dicts, strict=True):
        torch.save(wrap(state), file)
    return files


@pytest.mark.parametrize("make", [mlp, normed, lambda: mlp(nn.ReLU)])
def test_steps_and_layers_sum_to_the_prediction(make):
    dicts = states(make())
    run = explaind.from_checkpoints(dicts, make(), steps=[0, 5, 10, 15])
    result = run.attribute(query(), by=BY)
    closure = result.check()
    assert (run.num_steps, closure.other) == (3, 0)
    model = make()
    model.load_state_dict(dicts[-1])
    expected = query().output(model.eval()(query().arguments["0"]))
    np.testing.assert_allclose(result.dataset.prediction, expected.detach(), rtol=1e-12)
    by_parameter = run.attribute(query(), by=("query", "update_step", "parameter"), steps=[1], layers=["0.weight"])
    assert by_parameter.check().other == 0


def test_it_is_what_is_known_of_a_recorded_run(tmp_path):
    recorded, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    run = explaind.from_checkpoints([recorded.params(step) for step in range(recorded.num_steps + 1)], mlp())
    by = ("query", "update_step", "layer")
    known, found = (each.attribute(query(), by=by).dataset for each in (recorded, run))
    np.testing.assert_allclose(
        found.contribution, known.contribution + known.decay + known.other + known.rounding, atol=1e-12
    )
    assert torch.equal(run.flat_params(2), recorded.flat_params(2))


def test_what_is_known_is_shown():
    dicts = states(mlp())
    run = explaind.from_checkpoints(dicts, mlp(), steps=[0, 5, 10, 30])
    assert run.layers == {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}
    assert all(torch.equal(run.params(2)[name], dicts[2][name]) for name in dicts[2])
    assert run.history["from"].tolist() == [0, 5, 10]
    assert run.history["to"].tolist() == run.checkpoints[1:] == [5, 10, 30]
    moved = run.table.flatten(dicts[1]) - run.table.flatten(dicts[0])
    assert run.history.update_norm[0] == pytest.approx(float(moved.norm()))
    assert "made of checkpoints" in repr(run)
    assert run.info().num_examples == 0
    assert run.plan(query(), by=BY).steps == 3


def test_what_is_not_known_is_refused():
    run = explaind.from_checkpoints(states(mlp()), mlp())
    for by, options in [
        (("query", "example"), {}),
        (("query", "group"), {"groups": []}),
        (("query",), {"examples": [0]}),
        (("query", "token"), {}),
    ]:
        with pytest.raises(UnknownUpdateRuleError, match=r"made of checkpoints.*no example can be credited"):
            run.attribute(query(), by=by, **options)
    for ask, message in [
        (lambda: run.verify(), "not batches that steps could be replayed from"),
        (lambda: run.example_grads(0), "not gradients"),
        (lambda: run.flat_gradient(0), "not gradients"),
        (lambda: run.state(0), "not optimizer state"),
        (lambda: run.settings(0, 0), "not optimizer settings"),
    ]:
        with pytest.raises(NotRecordedError, match=message):
            ask()


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_files_of_torch_are_read(key, tmp_path):
    dicts = states(mlp(), num=2)
    files = saved(dicts, tmp_path, lambda state: state if key is None else {key: state, "epoch": 3, "optimizer": {}})
    run = explaind.from_checkpoints(files, mlp())
    assert torch.equal(run.flat_params(1), run.table.flatten(dicts[1]))


def test_files_of_safetensors_are_read(tmp_path):
    dicts = states(normed(), num=3)
    files = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    for state, file in zip(dicts, files, strict=True):
        save_file(state, file)
    run = explaind.from_checkpoints(files, normed())
    assert torch.equal(run.flat_params(2), run.table.flatten(dicts[2]))
    assert all(torch.equal(run.fixed(s)["1.running_mean"], dicts[s]["1.running_mean"]) for s in range(3))
    (tmp_path / "1.safetensors").write_bytes(b"not")
    with pytest.raises(ValueError, match=r"1\.safetensors is not a whole safetensors file"):
        explaind.from_checkpoints(files, normed())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_wrapped_models_are_understood(prefix):
    dicts = states(mlp(), num=2)
    run = explaind.from_checkpoints([{prefix + name: t for name, t in state.items()} for state in dicts], mlp())
    assert torch.equal(run.flat_params(1), run.table.flatten(dicts[1]))


def test_narrower_numbers_are_widened_exactly():
    halves = [{name: t.to(torch.bfloat16) for name, t in state.items()} for state in states(mlp(), num=2)]
    run = explaind.from_checkpoints(halves, mlp())
    assert run.params(1)["0.weight"].dtype == torch.float64
    assert torch.equal(run.params(1)["0.weight"], halves[1]["0.weight"].double())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)

    def forward(self, x):
        return self.scale * self.other(self.one(x))


def test_tied_parameters_and_buffers_that_are_not_saved():
    ones = {"one.weight": torch.ones(3, 3), "other.weight": torch.ones(3, 3)}
    only_one = {"other.weight": torch.full((3, 3), 2.0)}
    run = explaind.from_checkpoints([ones, only_one], Tied())
    assert list(run.params(1)) == ["one.weight"]
    asked = explaind.Query(torch.ones(1, 3), output=explaind.outputs.logit([0]))
    result = run.attribute(asked, by=("query", "step"))
    result.check()
    assert result.dataset.prediction.item() == 2 * 2 * 3 * 2 * 3
    with pytest.raises(ModelMismatchError, match=r"'one\.weight' and 'other\.weight' are one tensor in the model"):
        explaind.from_checkpoints([ones, ones | only_one], Tied())


def test_a_given_store_is_kept_and_opened_again(tmp_path):
    path = tmp_path / "run.zarr"
    expected = explaind.from_checkpoints(states(normed(), num=2), normed(), steps=[0, 5], store=path)
    again = explaind.open_run(path, model=normed())
    assert again.checkpoints == [0, 5]
    assert again.history.equals(expected.history)
    assert all(torch.equal(again.fixed(1)[name], tensor) for name, tensor in expected.fixed(1).items())
    assert not list(find_damage(StoreReader(path)))
    with pytest.raises(StoreExistsError):
        explaind.from_checkpoints(states(normed(), num=2), normed(), store=path)


def test_a_temporary_store_goes_with_the_run():
    run = explaind.from_checkpoints(states(mlp(), num=2), mlp())
    path = run.path
    assert path.is_dir()
    del run
    gc.collect()
    assert not path.parent.exists()


def without(state, name):
    return {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s: without(s, "0.bias"), ModelMismatchError, r"1\.pt has no '0\.bias', which the model has"),
        (
            lambda s: without(s, "1.running_mean"),
            ModelMismatchError,
            r"1\.pt has no '1\.running_mean', which the model has",
        ),
        (
            lambda s: s | {"4.weight": torch.ones(2)},
            ModelMismatchError,
            r"1\.pt has '4\.weight', which the",
        ),
        (
            lambda s: s | {"0.bias": torch.ones(2)},
            ModelMismatchError,
            r"'0\.bias' has the shape \(2,\) in .*1\.pt, and \(4,\) in the model",
        ),
        (
            lambda s: s | {"0.bias": torch.ones(4, dtype=torch.complex64)},
            ModelMismatchError,
            r"'0\.bias' is torch\.complex64 in .*1\.pt, which torch\.float64",
        ),
        (
            lambda s: s | {"0.bias": torch.full((4,), torch.nan)},
            NonFiniteError,
            r"the parameter '0\.bias' has NaN or infinite entries in .*1\.pt",
        ),
        (lambda s: {"net": s, "epoch": 3}, ValueError, r"1\.pt is neither a state dict nor .* it has 'net', 'epoch'"),
        (lambda s: {"model": s, "state_dict": s}, ValueError, r"1\.pt is neither a state dict nor "),
        (lambda s: [1, 2], ValueError, r"1\.pt is neither a state dict nor .* it has list"),
        (lambda s: normed(), ValueError, r"1\.pt cannot be loaded with torch\.load\(weights_only=True\)"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, error, message, tmp_path):
    files = saved(states(normed(), num=2), tmp_path)
    torch.save(change(torch.load(files[1], weights_only=True)), files[1])
    with pytest.raises(error, match=message):
        explaind.from_checkpoints(files, normed(), store=tmp_path / "run.zarr")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.pt", "1.pt"]


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "notes.pt").write_text("notes")
    with pytest.raises(ValueError, match=r"notes\.pt cannot be loaded"):
        explaind.from_checkpoints([tmp_path / "notes.pt"] * 2, mlp())
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        explaind.from_checkpoints([tmp_path / "nowhere.pt"] * 2, mlp())


def test_a_single_checkpoint_or_labels_that_do_not_fit_are_refused():
    dicts = states(mlp(), num=2)
    with pytest.raises(ValueError, match="at least two checkpoints, one before and one after; got 1"):
        explaind.from_checkpoints(dicts[:1], mlp())
    for steps in ([0], [0, 0], [1, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="steps= needs an increasing number for each of 2 checkpoints"):
            explaind.from_checkpoints(dicts, mlp(), steps=steps)
