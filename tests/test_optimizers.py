"""Every optimizer of torch.optim with every flag that changes its update, against the slow twin."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)

import explaind
from explaind import quadrature, reference
from explaind.errors import RecordingError, UnknownUpdateRuleError
from explaind.optimizers import RULES, ParameterStep
from explaind.reference import filters
from tests.cases import NUM_CLASSES, NUM_FEATURES, Case, data, mlp, one_group, query, train
from tests.test_docs import blocks

NODES = quadrature.gauss_legendre(6)  # the twin's


def matrices(dtype=torch.float64):
    """Wide, tall and square: Muon takes matrices only."""
    torch.manual_seed(3)
    sizes = [(NUM_FEATURES, 5), (5, 5), (5, NUM_CLASSES)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size, bias=False), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


# Per optimizer the settings that all of its cases share, and per case the flags that change the update.
VARIANTS = {
    SGD: (
        {"lr": 0.2},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "momentum": {"momentum": 0.8},
            "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
            "nesterov": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
            "foreach": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1, "foreach": True},
            "fused": {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1, "fused": True},
        },
    ),
    Adam: (
        {"lr": 0.05},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
            "amsgrad": {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.5)},
            "maximize": {"maximize": True, "weight_decay": 0.1, "eps": 1e-3},
            "foreach": {"foreach": True, "amsgrad": True, "weight_decay": 0.1},
            "fused": {"fused": True, "amsgrad": True, "weight_decay": 0.1},
        },
    ),
    AdamW: (
        {"lr": 0.05, "weight_decay": 0.3},
        {
            "plain": {},
            "amsgrad": {"amsgrad": True, "betas": (0.8, 0.5)},
            "maximize": {"maximize": True},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
        },
    ),
    NAdam: (
        {"lr": 0.02},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1, "momentum_decay": 0.1},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "foreach": {"foreach": True, "weight_decay": 0.1},
        },
    ),
    RAdam: (
        {"lr": 0.05, "betas": (0.8, 0.9)},
        {
            "plain": {},
            "not-yet-rectified": {"betas": (0.9, 0.999), "weight_decay": 0.1},
            "decay": {"weight_decay": 0.1},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "foreach": {"foreach": True, "weight_decay": 0.1},
        },
    ),
    Adamax: (
        {"lr": 0.05},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1, "betas": (0.8, 0.6)},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "foreach": {"foreach": True, "weight_decay": 0.1},
        },
    ),
    Adagrad: (
        {"lr": 0.1},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "foreach": {"foreach": True, "lr_decay": 0.3},
            "fused": {"fused": True, "lr_decay": 0.3, "weight_decay": 0.1},
        },
    ),
    Adadelta: (
        {"lr": 2.0, "eps": 1e-3},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1, "rho": 0.6},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "foreach": {"foreach": True, "weight_decay": 0.1},
        },
    ),
    RMSprop: (
        {"lr": 0.02},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1, "alpha": 0.7, "eps": 1e-3},
            "centered": {"centered": True, "alpha": 0.7},
            "momentum": {"momentum": 0.6, "weight_decay": 0.1},
            "centered-momentum": {"momentum": 0.6, "centered": True, "alpha": 0.8, "weight_decay": 0.1},
            "maximize": {"maximize": True, "momentum": 0.6, "weight_decay": 0.1},
            "foreach": {"foreach": True, "momentum": 0.6, "centered": True, "alpha": 0.8},
        },
    ),
    Rprop: (
        {"lr": 0.02},
        {
            "plain": {},
            "sizes": {"etas": (0.3, 1.5), "step_sizes": (0.015, 0.04)},
            "maximize": {"maximize": True},
            "foreach": {"foreach": True},
        },
    ),
    ASGD: (
        {"lr": 0.2},
        {
            "plain": {},
            "decay": {"lambd": 0.1, "alpha": 0.5, "t0": 2.0, "weight_decay": 0.1},
            "maximize": {"maximize": True, "lambd": 0.1},
            "foreach": {"foreach": True, "lambd": 0.1, "weight_decay": 0.1},
        },
    ),
    Adafactor: (
        {"lr": 0.05},
        {
            "plain": {},
            "decay": {"weight_decay": 0.1, "beta2_decay": -0.5, "d": 1.5},
            "eps": {"eps": (0.02, 0.5)},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "foreach": {"foreach": True, "weight_decay": 0.1},
        },
    ),
    Muon: (
        {"lr": 0.02},
        {
            "plain": {},
            "without-nesterov": {"nesterov": False, "momentum": 0.8, "weight_decay": 0.3},
            "match-rms-adamw": {"adjust_lr_fn": "match_rms_adamw"},
            "coefficients": {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3},
        },
    ),
}

CASES = [
    Case(name=f"{make.__name__}-{name}", optimizer=one_group(make, **shared | flags), scheduled=True)
    for make, (shared, variants) in VARIANTS.items()
    for name, flags in variants.items()
]


def in_two_groups(make, **settings):
    """Each matrix or bias of the first layer with other settings than the rest."""

    def build(model):
        first, *rest = model.parameters()
        other = {"lr": settings["lr"] / 2} | ({"weight_decay": 0.4} if make is not Rprop else {})
        return make([{"params": [first], **other}, {"params": rest}], **settings)

    return build


CASES += [
    Case(name=f"{make.__name__}-two-groups", optimizer=in_two_groups(make, **shared), batch_size=9, epochs=4)
    for make, (shared, _) in VARIANTS.items()
]


def is_muon(case):
    return case.name.startswith("Muon")


def record_case(case, path, dtype=torch.float64):
    def build():
        return matrices(dtype) if is_muon(case) else mlp(dtype=dtype)

    model = build()
    optimizer = case.optimizer(model)
    with explaind.trace(model, optimizer, path) as recorder:
        train(case, model, recorder, optimizer)
    return explaind.open_run(path, model=build())


def record_steps(model, optimizer, path, losses):
    with explaind.trace(model, optimizer, path):
        for loss in losses:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    return explaind.open_run(path, model=model)


def errors_of_the_twin(run):
    """‖Δ_s + share of the whole gradient + decay‖ / ‖Δ_s‖ of every parameter and step."""
    for p, parameter in enumerate(run.table):
        history = filters.History(run, p)
        for s, share in history.follow({s: update.whole for s, update in history.updates.items()}).items():
            update = run.update(s)[parameter.name]
            yield float((update + share + history.decoupled_decay(s)).norm() / update.norm())


@pytest.fixture(scope="module", params=CASES, ids=str)
def recorded(request, tmp_path_factory):
    return request.param, record_case(request.param, tmp_path_factory.mktemp("run") / "run.zarr")


@pytest.fixture(scope="module")
def expected(recorded):
    return reference.decompose(recorded[1], query())


def assert_equal_to_the_twin(run, expected, step_axis):
    other_axis = {"step": "update_step", "update_step": "step"}[step_axis]
    result = run.attribute(query(), by=("query", "example", step_axis, "parameter"), quadrature=NODES)
    result.check()
    for term, twin in (("contribution", expected.contribution.sum("token")), ("decay", expected.decay)):
        actual, sizes = result.dataset[term], np.abs(twin).sum(other_axis)
        assert not np.any(actual.values[sizes.values == 0])
        assert float((np.abs(actual - twin.sum(other_axis)) / sizes.where(sizes > 0, 1.0)).max()) <= 1e-9
    assert float(np.abs(result.dataset.other).sum()) < 1e-12
    return float(np.abs(result.dataset.rounding).sum())


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
def test_every_single_contribution_and_decay_equals_the_twin(recorded, expected, step_axis):
    case, run = recorded
    rounding = assert_equal_to_the_twin(run, expected, step_axis)
    if not is_muon(case):  # which computes in bfloat16
        assert rounding < 1e-12
        assert max(errors_of_the_twin(run)) <= 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if is_muon(case)], ids=str)
def test_muon_that_computes_in_float64_leaves_no_rounding(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    run = record_case(case, tmp_path / "run.zarr")
    assert max(errors_of_the_twin(run)) <= 1e-12
    result = run.attribute(query(), by=("query", "example", "step", "parameter"))
    result.check()
    assert float(np.abs(result.dataset.rounding).sum()) < 1e-12
    assert float(np.abs(result.dataset.other).sum()) < 1e-12


def test_the_recorded_steps_replay_bit_for_bit(recorded):
    _, run = recorded
    assert run.verify().bit_exact


def closes(run):
    """Sums of |other| and |rounding|."""
    result = run.attribute(
        query(next(iter(run.params(0).values())).dtype), by=("query", "example", "step", "parameter")
    )
    result.check()
    return [float(np.abs(result.dataset[term]).sum()) for term in ("other", "rounding")]


DENSE = [make for make in VARIANTS if make is not Muon]


@pytest.mark.parametrize("make", DENSE)
def test_a_learning_rate_in_a_tensor_counts_as_the_optimizer_rounds_it(make, tmp_path):
    def build(model):
        return make(model.parameters(), **VARIANTS[make][0] | {"lr": torch.tensor(VARIANTS[make][0]["lr"])})

    run = record_case(Case(name="", optimizer=build, scheduled=True), tmp_path / "run.zarr")
    rates = [run.settings(s, 0)["lr"] for s in range(run.num_steps)]
    assert all(rate.dtype == torch.float32 for rate in rates)
    assert rates[-1] < rates[0]  # the scheduler writes into the tensor
    assert run.verify().bit_exact
    other, rounding = closes(run)
    assert other < 1e-12
    assert rounding < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("make", [Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, RMSprop, Rprop, ASGD])
def test_capturable_steps_leave_only_the_rounding_of_their_count(make, foreach, dtype, tmp_path, monkeypatch):
    module = sys.modules[make.__module__ if make is not AdamW else Adam.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *args, **options: ["cpu"])
    flags = VARIANTS[make][0] | {"capturable": True, "foreach": foreach}
    case = Case(name="", optimizer=one_group(make, **flags), scheduled=True)
    run = record_case(case, tmp_path / "run.zarr", dtype)
    assert run.verify().bit_exact
    other, rounding = closes(run)
    assert other < 1e-12
    assert rounding < 1e-4


@pytest.mark.parametrize("make", list(VARIANTS))
def test_float32_steps_leave_only_rounding(make, tmp_path):
    case = Case(name=make.__name__, optimizer=one_group(make, **VARIANTS[make][0]), scheduled=True)
    run = record_case(case, tmp_path / "run.zarr", torch.float32)
    assert run.verify().bit_exact
    other, rounding = closes(run)
    assert other == 0
    assert make is Muon or rounding < 1e-4


def test_a_scheduler_of_the_betas_counts(tmp_path):
    def build(model):
        def change(optimizer, *_):
            beta1, beta2 = optimizer.param_groups[0]["betas"]
            optimizer.param_groups[0]["betas"] = (0.95 * beta1, beta2)

        optimizer = AdamW(model.parameters(), lr=0.05)
        optimizer.register_step_post_hook(change)
        return optimizer

    run = record_case(Case(name="", optimizer=build), tmp_path / "run.zarr")
    assert_equal_to_the_twin(run, reference.decompose(run, query()), "step")


def test_a_variance_that_cancels_widens_what_counts_as_rounding():
    settings = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "eps": 1e-8, "centered": True, "maximize": False}

    def roundoff(variance):
        square, mean = torch.tensor([1.0 + variance], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        step = ParameterStep(
            settings=settings,
            params=mean,
            gradient=mean,
            before={},
            after={"square_avg": square, "grad_avg": mean},
            dtype=torch.float32,
        )
        found = RULES["torch.optim.rmsprop.RMSprop"].filter(step)
        assert torch.isfinite(found.gradient_gain).all()
        return float(found.update_roundoff / found.gradient_gain)

    assert roundoff(1.0) < 1e-5  # as a part of the update
    assert roundoff(1e-5) > 0.01
    assert roundoff(0.0) > 0.5
    assert roundoff(-1e-9) > 0.5


def test_every_group_follows_the_rule_of_its_own_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model = mlp()
    optimizers = [
        Muon([model[0].weight], lr=0.02),
        AdamW([model[0].bias, model[2].weight], lr=0.05, weight_decay=0.3),
        SGD([model[2].bias], lr=0.1, momentum=0.9),
    ]
    x, y = data().tensors
    with explaind.trace(model, optimizers, tmp_path / "run.zarr") as recorder:
        for batch in ([0, 1, 2], [3, 4], [0, 5, 6, 7]):
            recorder.examples(batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert [name.rpartition(".")[2] for name in run.group_optimizers] == ["Muon", "AdamW", "SGD"]
    expected = reference.decompose(run, query())
    for step_axis in ("step", "update_step"):
        assert assert_equal_to_the_twin(run, expected, step_axis) < 1e-12
    assert run.verify().bit_exact


# ---------------------------------------------------------------------- state and settings


class Scaled(nn.Module):
    """A temperature that may get a gradient before the weights do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x @ (self.weight.detach() if self.training else self.weight)


def test_state_that_begins_on_a_parameter_without_axes_is_kept_apart(tmp_path):
    model = Scaled()
    optimizer = Adam(model.parameters(), lr=0.1, amsgrad=True)

    def loss(training):
        return lambda m: m.train(training)(torch.ones(4, 3, dtype=torch.float64)).square().mean()

    run = record_steps(model, optimizer, tmp_path / "run.zarr", [loss(True), loss(True), loss(False), loss(False)])
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(run.state(4)[name][key], value)
            assert run.state(4)[name][key].dtype == value.dtype
    assert set(run.state(2)) == {"scale", "weight"}
    assert set(run.state(2)["scale"]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert run.state(2)["weight"] == {}
    assert run.verify().bit_exact
    x = torch.ones(2, 3, dtype=torch.float64)
    result = run.attribute(explaind.Query(x, output=explaind.outputs.value(0)), by=("query", "step"))
    result.check()
    assert float(np.abs(result.dataset.other).sum()) < 1e-14


class Odd(SGD):
    """Keeps all kinds of state."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.register_step_post_hook(Odd.keep)

    def keep(self, *_):
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["rate"] = 0.1 * state["count"]
                state["double"] = torch.full((2, 3), 0.1 * state["count"], dtype=torch.float64)
                state["whole"] = torch.full_like(parameter, 2**24 + state["count"], dtype=torch.int64)
                state["growing"] = torch.zeros(state["count"])
                state["mixed"] = torch.tensor(0.25) if place else torch.full_like(parameter, 0.5)
                state["late"] = torch.ones(3, 2) if state["count"] > 1 else None


def test_state_of_every_kind_is_read_back_as_it_was(tmp_path):
    model = mlp(dtype=torch.float32)
    optimizer = Odd(model.parameters(), lr=0.1)
    run = record_steps(model, optimizer, tmp_path / "run.zarr", [lambda m: m(torch.ones(2, 3)).sum()] * 3)
    assert run.unrecorded_state == ["growing"]
    for name, parameter in model.named_parameters():
        read = run.state(3)[name]
        assert set(read) == set(optimizer.state[parameter]) - {"growing"}
        for key, value in read.items():
            expected = optimizer.state[parameter][key]
            assert torch.equal(value, torch.as_tensor(expected, dtype=value.dtype))
            assert not isinstance(expected, torch.Tensor) or value.dtype == expected.dtype
    assert "late" not in run.state(1)["0.weight"]
    assert run.state(0)["0.weight"] == {}


def test_settings_that_are_not_numbers_may_not_change(tmp_path):
    for key, value in {"foreach": True, "lr": torch.tensor(0.1), "nesterov": None}.items():
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss(m, optimizer=optimizer, key=key, value=value):
            optimizer.param_groups[0][key] = value
            return m(torch.ones(2, 3, dtype=torch.float64)).sum()

        with pytest.raises(RecordingError, match=f"setting '{key}' of parameter group 0 was .* and is .* now"):
            record_steps(model, optimizer, tmp_path / f"{key}.zarr", [loss])


# ---------------------------------------------------------------------- rules of the user


def lion(updates):
    mean = whole = torch.zeros((), dtype=torch.float64)
    for x in updates:
        beta1, beta2 = x.settings["betas"]
        size = (beta1 * whole + (1 - beta1) * x.whole).abs()
        yield x.settings["lr"] * (beta1 * mean + (1 - beta1) * x.part) / size
        mean, whole = beta2 * mean + (1 - beta2) * x.part, beta2 * whole + (1 - beta2) * x.whole


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """What the documentation's page defines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RULES, "documented.Lion", None)  # put back after the test
    names = {"__name__": "documented"}
    for block in blocks("docs/optimizers.md"):
        exec(compile(block, "docs/optimizers.md", "exec"), names)
    return names


def test_the_documented_rule_of_lion_is_short_and_exact(documented, tmp_path, monkeypatch, capsys):
    assert max(len(block.splitlines()) for block in blocks("docs/optimizers.md") if "Rule" in block) < 40
    monkeypatch.setitem(filters.TEXTBOOKS, "Lion", lion)
    case = Case(name="", optimizer=one_group(documented["Lion"], lr=0.02), scheduled=True)
    run = record_case(case, tmp_path / "run.zarr")
    expected = reference.decompose(run, query())
    for step_axis in ("step", "update_step"):
        assert assert_equal_to_the_twin(run, expected, step_axis) < 1e-12
    assert max(errors_of_the_twin(run)) <= 1e-12


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_wrong_rule_shows_in_other(documented, tmp_path):
    class Wrong(documented["LionRule"]):
        def filter(self, step):
            return dataclasses.replace(super().filter(step), intake=0.02)

    explaind.optimizers.register("documented.Lion", Wrong())
    run = record_case(Case(name="", optimizer=one_group(documented["Lion"], lr=0.02)), tmp_path / "run.zarr")
    other, _ = closes(run)
    assert other > 1e-3


def test_a_subclass_is_unknown_until_it_is_registered(tmp_path, monkeypatch):
    class Renamed(SGD):
        """Changes nothing."""

    name = f"{__name__}.{Renamed.__qualname__}"
    monkeypatch.setitem(RULES, name, None)
    run = record_case(Case(name="", optimizer=one_group(Renamed, lr=0.1)), tmp_path / "run.zarr")
    with pytest.raises(UnknownUpdateRuleError, match=r"Renamed is not known.*register adds one"):
        run.attribute(query(), by=("query", "example"))
    run.attribute(query(), by=("query", "step", "layer")).check()
    explaind.optimizers.register(Renamed, RULES["torch.optim.sgd.SGD"])
    run.attribute(query(), by=("query", "example")).check()


def test_register_says_what_it_needs():
    rule = RULES["torch.optim.sgd.SGD"]
    for optimizer in (SGD([torch.zeros(1)]), "SGD", nn.Linear):
        with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer or the full name of one"):
            explaind.optimizers.register(optimizer, rule)
    for wrong in (type(rule), object(), None):
        with pytest.raises(TypeError, match=r"an attribute `buffer` and a method `filter\(step\)`"):
            explaind.optimizers.register(SGD, wrong)
