"""Averaged weights as what is explained: against torch's own averages, and against the slow twin."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader

import explaind
from explaind import averages, quadrature, reference
from tests.cases import NUM_CLASSES, NUM_FEATURES, data, mlp, query

NUM_STEPS = 9  # 3 epochs in 3 batches
BY = ("query", "example", "step", "parameter")
AVERAGES = {
    "ema": (averages.ema(0.6), get_ema_multi_avg_fn(0.6)),
    "ema-late": (averages.ema(0.5, start=3, every=2), get_ema_multi_avg_fn(0.5)),
    "swa": (averages.swa(), None),
    "swa-by-epoch": (averages.swa(start=2, every=3), None),
}


def train(path, average, averaging, make_model=mlp, make_optimizer=None, batch_size=4, **settings):
    """Three epochs with an averaged model as a user keeps one; returns the run and the averaged model."""
    model = make_model(**settings)
    optimizer = (make_optimizer or momentum)(model)
    averaged = AveragedModel(model, multi_avg_fn=averaging)
    loader = DataLoader(data(next(model.parameters()).dtype), batch_size=batch_size, shuffle=True)
    torch.manual_seed(11)
    step = 0
    with explaind.trace(model, optimizer, path) as recorder:
        for _ in range(3):
            for x, y in recorder.batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if step >= average.start and (step - average.start) % average.every == 0:
                    averaged.update_parameters(model)
                step += 1
    return explaind.open_run(path, model=make_model(**settings)), averaged


def momentum(model):
    return SGD(model.parameters(), lr=0.3, momentum=0.7, weight_decay=0.05)


def batch_norm_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, NUM_CLASSES)).double()


def replaced(average, **changes):
    make = averages.swa if average.name == "swa" else lambda **more: averages.ema(average.keep(1), **more)
    return make(**{"start": average.start, "every": average.every} | changes)


def predictions(module):
    """The queries of a module by plain torch."""
    with torch.no_grad():
        return query().output(module.eval()(query().inputs))


@pytest.fixture(scope="module", params=AVERAGES, ids=str)
def trained(request, tmp_path_factory):
    average, averaging = AVERAGES[request.param]
    run, averaged = train(tmp_path_factory.mktemp("run") / "run.zarr", average, averaging)
    assert run.num_steps == NUM_STEPS
    return run, average, averaged


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
def test_the_prediction_is_the_averaged_models_and_every_term_closes(trained, step_axis):
    run, average, averaged = trained
    result = run.attribute(
        query(), by=("query", "example", step_axis, "layer"), average=replaced(average, model=averaged), tolerance=1e-12
    )
    np.testing.assert_allclose(result.dataset.prediction, predictions(averaged), rtol=1e-12)
    np.testing.assert_allclose(result.total, predictions(averaged), rtol=1e-12)
    assert result.check().error <= 1e-12
    assert float(np.abs(result.dataset.other).sum()) < 1e-12
    assert float(np.abs(result.dataset.omitted).sum()) < 1e-12
    assert result.dataset.attrs["weights"] == average.name


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
def test_every_contribution_equals_following_each_update_into_every_later_average(trained, step_axis):
    run, average, _ = trained
    nodes = quadrature.gauss_legendre(6)  # the twin's
    result = run.attribute(
        query(), by=("query", "example", step_axis, "parameter"), average=average, quadrature=nodes
    ).dataset
    expected = reference.decompose(run, query(), average=average)
    for term in ("contribution", "decay"):
        exact = getattr(expected, term)
        exact = exact.sum([dim for dim in exact.dims if dim not in result[term].dims])
        np.testing.assert_allclose(result[term], exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
@pytest.mark.parametrize(
    "restriction", [{"steps": range(4, 7)}, {"steps": [1, 5]}, {"examples": [0, 3]}, {"layers": ["2"]}], ids=str
)
def test_restrictions_keep_their_entries_and_still_close(trained, step_axis, restriction):
    run, average, _ = trained
    by = ("query", "example", step_axis, "layer")
    whole = run.attribute(query(), by=by, average=average, tolerance=1e-12).dataset
    result = run.attribute(query(), by=by, average=average, tolerance=1e-12, **restriction)
    names = {"steps": step_axis, "examples": "example", "layers": "layer"}
    ((selected, kept),) = ((names[name], list(values)) for name, values in restriction.items())
    expected = whole.contribution.sel({selected: kept})
    np.testing.assert_allclose(result.dataset.contribution, expected, rtol=1e-9, atol=1e-12)
    assert result.check().error <= 1e-12
    left_out = whole.contribution.sum(("example", step_axis, "layer")) - expected.sum(("example", step_axis, "layer"))
    if selected == "example":  # weight decay, which no example brings, stays in
        np.testing.assert_allclose(result.dataset.omitted, left_out, rtol=1e-9, atol=1e-12)
    else:
        assert float(np.abs(result.dataset.omitted).min()) > 0


def test_an_average_that_keeps_nothing_is_the_last_weights(trained):
    run, _, _ = trained
    plain = run.attribute(query(), by=BY, tolerance=1e-12).dataset
    averaged = run.attribute(query(), by=BY, average=averages.ema(0.0), tolerance=1e-12).dataset
    np.testing.assert_allclose(averaged.contribution, plain.contribution, rtol=1e-9, atol=1e-13)
    assert plain.attrs["weights"] == "last"


def test_long_runs_are_averaged_in_stretches_that_join(tmp_path):
    model = mlp()
    optimizer = momentum(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    features, labels = data().tensors
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(23):  # between 4² and 5²: the last stretch is a short one
            optimizer.zero_grad()
            F.cross_entropy(model(features), labels).backward()
            optimizer.step()
            averaged.update_parameters(model)
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    average = averages.ema(0.9, model=averaged)
    result = run.attribute(query(), by=("query", "step"), average=average, tolerance=1e-12)
    np.testing.assert_allclose(result.total, predictions(averaged), rtol=1e-12)


def test_steps_without_an_update_cost_no_gradient(trained):
    run, average, _ = trained
    nodes = run.attribute(query(), by=("query",), average=average).dataset.num_nodes
    still = [keep == 1 for keep in average.schedule(run.num_steps)]
    assert nodes[:, still].sum() == 0
    assert (nodes[:, [not kept for kept in still]] > 0).all()


class Custom(Optimizer):
    """Sign descent, which no rule is known for."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.tanh())


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
@pytest.mark.parametrize("steps", [None, [2, 5]], ids=str)
def test_without_an_update_rule_steps_and_layers_still_close(tmp_path, step_axis, steps):
    average = averages.ema(0.6)
    run, averaged = train(
        tmp_path / "run.zarr", average, get_ema_multi_avg_fn(0.6), make_optimizer=lambda m: Custom(m.parameters())
    )
    by = ("query", step_axis, "layer")
    result = run.attribute(query(), by=by, average=average, steps=steps, tolerance=1e-12)
    np.testing.assert_allclose(result.dataset.prediction, predictions(averaged), rtol=1e-12)
    assert result.check().error <= 1e-12
    whole = run.attribute(query(), by=by, average=average, tolerance=1e-12)
    np.testing.assert_allclose(
        result.dataset.contribution, whole.dataset.contribution.sel({step_axis: steps or slice(None)}), rtol=1e-12
    )


def test_float32_averages_pass_as_rounded(tmp_path):
    average = averages.ema(0.6)
    run, averaged = train(
        tmp_path / "run.zarr",
        average,
        get_ema_multi_avg_fn(0.6),
        dtype=torch.float32,
        make_optimizer=lambda model: AdamW(model.parameters(), lr=0.05),
    )
    own = query(torch.float32)
    result = run.attribute(own, by=("query", "example"), average=replaced(average, model=averaged))
    result.check()
    with torch.no_grad():
        np.testing.assert_allclose(result.dataset.prediction, own.output(averaged(own.inputs)), rtol=1e-5)


# ---------------------------------------------------------------------- buffers


def test_buffers_are_those_that_torch_copied_with_the_last_update(tmp_path):
    average = averages.swa(start=1, every=3)  # last after step 7 of 0 … 8
    run, averaged = train(tmp_path / "run.zarr", average, None, make_model=batch_norm_net, batch_size=3)
    result = run.attribute(query(), by=("query", "example"), average=average, tolerance=1e-12)
    np.testing.assert_allclose(result.dataset.prediction, predictions(averaged), rtol=1e-12)
    result.check()


def test_the_averaged_model_brings_the_statistics_that_update_bn_computed(tmp_path):
    average = averages.swa(start=2, every=3)
    run, averaged = train(tmp_path / "run.zarr", average, None, make_model=batch_norm_net, batch_size=3)
    update_bn(DataLoader(data(), batch_size=9), averaged)
    of_model = replaced(average, model=averaged)
    result = run.attribute(query(), by=("query", "example"), average=of_model, tolerance=1e-12)
    np.testing.assert_allclose(result.dataset.prediction, predictions(averaged), rtol=1e-12)
    result.check()
    copied = run.attribute(query(), by=("query",), average=average)
    assert not np.allclose(copied.dataset.prediction, result.dataset.prediction)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("wrong", [{"start": 1}, {"every": 4}], ids=str)
def test_a_model_that_was_averaged_otherwise_is_refused(trained, wrong):
    run, average, averaged = trained
    with pytest.raises(ValueError, match=r"'0.weight' differs from .* of the recorded weights by .*rounding explains"):
        run.attribute(query(), by=("query",), average=replaced(average, model=averaged, **wrong))


def test_another_model_is_refused(trained):
    run, average, _ = trained
    with pytest.raises(ValueError, match=r"the averaged model has no '0.weight'; the run has it with shape \(4, 3\)"):
        run.attribute(query(), by=("query",), average=replaced(average, model=AveragedModel(nn.Linear(3, 2))))


def test_an_average_that_never_starts_is_refused(trained):
    run, _, _ = trained
    with pytest.raises(ValueError, match="the average starts after step 9, but the run has only the steps 0 to 8"):
        run.attribute(query(), by=("query",), average=averages.swa(start=9))


def test_parameters_that_another_optimizer_moves_need_the_averaged_model(tmp_path):
    def other_moves(model):
        own = SGD(model[0].parameters(), lr=0.1)
        own.register_step_post_hook(lambda *_: model[2].bias.data.add_(0.1))
        return own

    run, averaged = train(
        tmp_path / "run.zarr",
        averages.ema(0.6),
        get_ema_multi_avg_fn(0.6),
        make_model=frozen_head,
        make_optimizer=other_moves,
    )
    with pytest.raises(ValueError, match=r"'2.bias' changed without the traced optimizer, so its average is not known"):
        run.attribute(query(), by=("query",), average=averages.ema(0.6))
    result = run.attribute(query(), by=("query",), average=averages.ema(0.6, model=averaged), tolerance=1e-12)
    np.testing.assert_allclose(result.dataset.prediction, predictions(averaged), rtol=1e-12)


def frozen_head():
    model = mlp()
    model[2].requires_grad_(False)
    return model


def test_what_is_no_average_is_refused(trained):
    run, _, averaged = trained
    with pytest.raises(TypeError, match=r"average must be one of explaind.averages, such as averages.ema\(0.9\)"):
        run.attribute(query(), by=("query",), average=0.9)
    with pytest.raises(TypeError, match=r"model must be the averaged torch.nn.Module"):
        averages.swa(model=dict(averaged.named_parameters()))
    with pytest.raises(ValueError, match=r"decay must be between 0 and 1, got 1.5"):
        averages.ema(1.5)
    with pytest.raises(ValueError, match="start=0, every=0"):
        averages.swa(every=0)
    growing = averages.Average(name="growing", keep=lambda count: count)
    with pytest.raises(ValueError, match=r"keeps a part between 0 and 1 of itself; growing keeps 2.0"):
        run.attribute(query(), by=("query",), average=growing)


def test_any_running_average_can_be_written_down(trained):
    run, _, _ = trained
    warming_up = averages.Average(name="warming up", keep=lambda count: min(0.9, (1 + count) / (10 + count)))
    expected = run.params(1)
    for count in range(1, run.num_steps):
        keep = warming_up.keep(count)
        expected = {name: keep * expected[name] + (1 - keep) * p for name, p in run.params(count + 1).items()}
    result = run.attribute(query(), by=("query", "example"), average=warming_up, tolerance=1e-12)
    with torch.no_grad():
        exact = query().output(functional_call(run.model.eval(), expected, (query().inputs,)))
    np.testing.assert_allclose(result.dataset.prediction, exact, rtol=1e-12)
    result.check()
