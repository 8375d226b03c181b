"""A model, an optimizer or a loop that cannot be recorded is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader, IterableDataset

import explaind
from explaind.errors import NonFiniteError, RecordingError, StoreExistsError, StoreFormatError
from tests.cases import mlp, one_group, query
from tests.traced import FEATURES, LABELS, recorded, step_on, three_steps


def sgd(model):
    return SGD(model.parameters(), lr=0.2)


@pytest.fixture
def traced(tmp_path):
    """A model in training: `with traced() as (model, optimizer, recorder)`; the store is `run.zarr`."""

    class Traced:
        def __init__(self, model=None, **options):
            self.model = mlp() if model is None else model
            self.optimizer = sgd(self.model)
            self.recorder = explaind.trace(self.model, self.optimizer, tmp_path / "run.zarr", **options)

        def __enter__(self):
            return self.model, self.optimizer, self.recorder.__enter__()

        def __exit__(self, *error):
            return self.recorder.__exit__(*error)

    return Traced


# ---------------------------------------------------------------------- what can be traced


def test_a_model_and_optimizers_are_expected(tmp_path):
    model = mlp()
    halves = [SGD(model[0].parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"'0\.weight' belongs to two optimizers"):
        explaind.trace(model, halves, tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"expects a torch\.optim\.Optimizer, got StepLR"):
        explaind.trace(model, torch.optim.lr_scheduler.StepLR(halves[0], 1), tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"expects a torch\.optim\.Optimizer, got none"):
        explaind.trace(model, [], tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got function"):
        explaind.trace(mlp, halves[0], tmp_path / "run.zarr")
    with pytest.raises(TypeError, match="LBFGS evaluates its closure several times"):
        explaind.trace(model, LBFGS(model.parameters()), tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="example_grads must be 'replayed' or 'stored', got 'kept'"):
        explaind.trace(model, sgd(model), tmp_path / "run.zarr", example_grads="kept")
    assert not (tmp_path / "run.zarr").exists()


def test_a_parameter_the_optimizer_does_not_own_is_named(tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match=r"does not own the parameter '2\.weight' .*\(nor 1 others\)"):
        explaind.trace(model, SGD(model[0].parameters(), lr=0.1), tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=r"freeze it with requires_grad_\(False\)"):
        explaind.trace(model, SGD([*model[0].parameters(), model[2].weight], lr=0.1), tmp_path / "run.zarr")


def test_parameters_the_model_does_not_have_are_counted(tmp_path):
    model = mlp()
    foreign = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="the optimizer owns 1 parameter that the model does not have"):
        explaind.trace(model, SGD([*model.parameters(), foreign], lr=0.1), tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="owns 2 parameters that the model does not have"):
        explaind.trace(model[0], sgd(model), tmp_path / "run.zarr")


def test_a_store_that_exists_is_replaced_only_on_request(traced, tmp_path):
    with traced() as (model, optimizer, _):
        step_on(model, optimizer, slice(0, 3))
    with pytest.raises(StoreExistsError, match=r"run\.zarr exists already\. Give another path, or overwrite"):
        traced()
    assert explaind.open_run(tmp_path / "run.zarr").num_steps == 1
    with traced(overwrite=True) as (model, optimizer, _):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
    assert explaind.open_run(tmp_path / "run.zarr").num_steps == 2


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_overwriting_never_deletes_what_is_no_run(kind, traced, tmp_path):
    thesis = tmp_path / "run.zarr"
    if kind == "directory":
        thesis.mkdir()
        thesis = thesis / "thesis.tex"
    thesis.write_text("dear")
    with pytest.raises(StoreExistsError, match="is not a recorded run, so overwrite=True does not delete it"):
        traced(overwrite=True)
    assert thesis.read_text() == "dear"


# ---------------------------------------------------------------------- the loop


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x, factor):
        return factor * self.linear(x)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.linear(x).mean(dim=0)


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.ones(1, 3)])
def test_an_input_shared_by_the_batch_cannot_be_told_apart(factor, traced):
    with (
        pytest.raises(RecordingError, match=r"cannot be told apart: .*input '1' has shape .*first axis"),
        traced(Scaled()) as (model, _, _),
    ):
        model(FEATURES[:4], factor)


def test_an_output_without_a_row_per_example_cannot_be_told_apart(traced):
    with (
        pytest.raises(RecordingError, match=r"input '0' has shape \(4, 3\) and its output \(3,\)"),
        traced(Pooled()) as (model, _, _),
    ):
        model(FEATURES[:4])


def test_an_argument_that_cannot_be_recorded_is_named(traced):
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4).double()

        def forward(self, x, shape):
            return self.linear(x).reshape(sorted(shape))

    with (
        pytest.raises(RecordingError, match="the argument 'shape' is a set"),
        traced(Reshaped()) as (model, _, _),
    ):
        model(FEATURES[:4], shape={2, 8})


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3, 4]])
def test_ids_of_the_wrong_length_are_counted(ids, traced):
    with (
        pytest.raises(RecordingError, match=f"{len(ids)} example ids were given for a batch of 3 rows"),
        traced() as (model, optimizer, recorder),
    ):
        recorder.examples(ids)
        step_on(model, optimizer, slice(0, 3))


@pytest.mark.parametrize("ids", [[0.5, 1.0], ["a", "b"], [[1], [2]], 7, [True, False]])
def test_ids_are_integers(ids, traced):
    with (
        pytest.raises(TypeError, match=r"a flat sequence of integers, one per row of the batch; got"),
        traced() as (_, _, recorder),
    ):
        recorder.examples(ids)


@pytest.mark.parametrize("named_first", [True, False])
def test_either_every_batch_is_named_or_none(named_first, traced):
    with (
        pytest.raises(RecordingError, match=r"step 1 has a batch whose examples are (not )?named, unlike"),
        traced() as (model, optimizer, recorder),
    ):
        if named_first:
            recorder.examples([4, 5, 6])
        step_on(model, optimizer, slice(0, 3))
        if not named_first:
            recorder.examples([4, 5, 6])
        step_on(model, optimizer, slice(0, 3))  # names given by hand are those of one step


def test_batches_expects_a_loader_with_indices(traced):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(FEATURES)

    with traced() as (_, _, recorder):
        with pytest.raises(TypeError, match=r"expects a .*DataLoader, got list.*recorder\.examples\(ids\)"):
            recorder.batches([FEATURES])
        with pytest.raises(TypeError, match="an IterableDataset has no indices"):
            recorder.batches(DataLoader(Stream()))


def test_a_gradient_that_did_not_come_through_the_model_is_refused(traced):
    with (
        pytest.raises(RecordingError, match=r"no call of the traced model reached the gradient of step 0"),
        traced() as (model, optimizer, _),
    ):
        model.forward(FEATURES[:3]).sum().backward()
        optimizer.step()


def test_a_forward_pass_from_before_the_last_update_is_refused(traced):
    with (
        pytest.raises(RecordingError, match="step 1 uses a forward call that was made before step 0's update"),
        traced(nn.Linear(3, 3).double()) as (model, optimizer, _),
    ):
        stale = model(FEATURES[:3])
        step_on(model, optimizer, slice(3, 6))
        stale.sum().backward()
        optimizer.step()


def test_a_run_without_steps_says_so(traced, tmp_path):
    with traced() as (model, _, _):
        F.cross_entropy(model(FEATURES), LABELS).backward()
    with pytest.raises(StoreFormatError, match=r"no finished optimizer step\. Was optimizer\.step"):
        explaind.open_run(tmp_path / "run.zarr")


def test_a_step_that_calls_its_parents_step_is_refused(tmp_path):
    class Counting(SGD):
        def step(self, closure=None):
            return super().step(closure)

    SGD([torch.zeros(1)], lr=0.1)  # torch installs its hooks in a class when it is first used
    with pytest.raises(RecordingError, match=r"its step\(\) calls that of another optimizer class"):
        recorded(tmp_path / "run.zarr", three_steps, optimizer=one_group(Counting, lr=0.2))


# ---------------------------------------------------------------------- NaN and infinity


def check_safe(path, num_steps):
    run = explaind.open_run(path, model=mlp())
    assert run.num_steps == num_steps
    assert run.complete
    assert all(tensor.isfinite().all() for tensor in run.params(num_steps).values())
    assert run.verify().bit_exact
    run.attribute(query(), by=("query", "example", "step", "layer")).check()


@pytest.mark.parametrize("loss", [float("nan"), torch.tensor(float("inf"))])
def test_a_loss_that_is_not_finite_names_the_step(loss, traced, tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"the loss is (nan|inf) at step 2"),
        traced() as (model, optimizer, recorder),
    ):
        for start in (0, 3):
            recorder.log(loss=1.0)
            step_on(model, optimizer, slice(start, start + 3))
        recorder.log(loss=loss)
    check_safe(tmp_path / "run.zarr", 2)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_gradient_that_is_not_finite_names_parameter_and_step(bad, traced, tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"gradient of '0\.weight' has NaN or infinite entries at step 2"),
        traced() as (model, optimizer, _),
    ):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
        optimizer.zero_grad()
        (bad * F.cross_entropy(model(FEATURES[:3]), LABELS[:3])).backward()
        optimizer.step()
    check_safe(tmp_path / "run.zarr", 2)


def test_a_parameter_that_becomes_infinite_names_the_step_and_leaves_those_before(traced, tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"step 2 made entries of the parameter '.*' NaN or infinite"),
        traced() as (model, optimizer, _),
    ):
        for rate in (0.1, 0.1, 1.7e308):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            (100 * F.cross_entropy(model(FEATURES[:3]), LABELS[:3])).backward()
            optimizer.step()
    check_safe(tmp_path / "run.zarr", 2)


@pytest.mark.parametrize(
    "store, options, message",
    [
        ("memory://resumed.zarr", {}, r"resume=True goes on with a run in a directory.*got memory://resumed\.zarr"),
        (
            "run",
            {"inputs": "by_reference"},
            r"tells inputs by their content, which inputs='by_reference'",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused_before_anything_is_recorded(store, options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        explaind.trace(model, SGD(model.parameters(), lr=0.1), store, resume=True, **options)
