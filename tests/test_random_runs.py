"""Models, optimizers, flags, batches and loops drawn at random: every run closes, and row order changes nothing.

130 are drawn, others each time; `EXPLAIND_DRAWS=20000 pytest tests/test_random_runs.py` draws more of them.
"""

import contextlib
import math
import os
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn, optim

import explaind
from tests.cases import data
from tests.random_models import MODELS

FEATURES, LABELS = data().tensors
NUM_DRAWS = int(os.environ.get("EXPLAIND_DRAWS", "130"))
drawn = settings(max_examples=NUM_DRAWS, deadline=None, suppress_health_check=list(HealthCheck), database=None)


SEPARATE = MODELS.keys() - {"dropout", "batchnorm"}
DISCONTINUOUS = {optim.Rprop, optim.Muon}
"""A sum in another order can be rounded to the other side of a threshold (sign, bfloat16)."""

flag = st.booleans()
decay = st.sampled_from([0.0, 0.1])
beta = st.sampled_from([0.0, 0.5, 0.9])
forms = st.sampled_from([{}, {"foreach": True}, {"foreach": False}])
fusible = st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}])


def flags(make, rate, form=forms, **strategies):
    """An optimizer class with drawn flags."""
    drawn_flags = st.fixed_dictionaries({"lr": st.just(rate), "weight_decay": decay, "maximize": flag, **strategies})
    return st.tuples(st.just(make), st.builds(lambda one, other: one | other, drawn_flags, form))


def nesterov(pair):
    make, options = pair
    plain = options["momentum"] > 0 and options["nesterov"]
    return make, options | {"nesterov": plain, "dampening": 0.0 if plain else options["dampening"]}


def without_maximize(pair):
    return pair[0], {key: value for key, value in pair[1].items() if key not in ("maximize", "weight_decay")}


moments = {"betas": st.tuples(beta, st.sampled_from([0.5, 0.99])), "eps": st.sampled_from([1e-8, 1e-2])}
OPTIMIZERS = {
    "SGD": flags(optim.SGD, 0.1, fusible, momentum=beta, dampening=st.sampled_from([0.0, 0.3]), nesterov=flag).map(
        nesterov
    ),
    "Adam": flags(optim.Adam, 0.02, fusible, amsgrad=flag, **moments),
    "AdamW": flags(optim.AdamW, 0.02, fusible, amsgrad=flag, **moments),
    "NAdam": flags(
        optim.NAdam, 0.02, momentum_decay=st.sampled_from([0.004, 0.1]), decoupled_weight_decay=flag, **moments
    ),
    "RAdam": flags(optim.RAdam, 0.02, decoupled_weight_decay=flag, **moments),
    "Adamax": flags(optim.Adamax, 0.02, **moments),
    "RMSprop": flags(optim.RMSprop, 0.01, alpha=st.sampled_from([0.5, 0.99]), momentum=beta, centered=flag),
    "Adagrad": flags(
        optim.Adagrad,
        0.05,
        fusible,
        lr_decay=st.sampled_from([0.0, 0.1]),
        initial_accumulator_value=st.sampled_from([0.0, 0.1]),
    ),
    "Adadelta": flags(optim.Adadelta, 1.0, rho=st.sampled_from([0.5, 0.9]), eps=st.sampled_from([1e-6, 1e-3])),
    "ASGD": flags(optim.ASGD, 0.1, lambd=st.sampled_from([1e-4, 0.1]), alpha=st.sampled_from([0.75, 0.5])),
    "Rprop": flags(optim.Rprop, 0.01, etas=st.sampled_from([(0.5, 1.2), (0.7, 1.1)])).map(without_maximize),
    "Adafactor": flags(optim.Adafactor, 0.02, beta2_decay=st.sampled_from([-0.8, -0.5]), d=st.sampled_from([1.0, 2.0])),
}
OPTIMIZERS["Muon"] = st.tuples(
    st.just(optim.Muon),
    st.fixed_dictionaries(
        {
            "lr": st.just(0.02),
            "weight_decay": decay,
            "momentum": st.sampled_from([0.5, 0.95]),
            "nesterov": flag,
            "adjust_lr_fn": st.sampled_from([None, "match_rms_adamw"]),
        }
    ),
)
micro_batches = st.lists(st.lists(st.integers(0, 8), min_size=2, max_size=6), min_size=1, max_size=2)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What a training loop does in each of its steps."""

    steps: list[list[list[int]]]
    """Example ids of every micro-batch of every step."""
    clip: str | None
    zero_grad: str
    smoothing: float
    reduction: str
    foreign: str | None
    """What else is in the gradient: a penalty on the parameters, or noise."""
    skip: int | None
    """A step that is not made, and its gradient dropped."""
    factor: float
    """The learning rate is multiplied by it in each step."""
    closure: bool
    aside: bool
    """Whether a forward pass is made whose output is thrown away."""
    two_groups: bool


loops = st.builds(
    Loop,
    steps=st.lists(micro_batches, min_size=1, max_size=4),
    clip=st.sampled_from([None, None, "norm", "each norm", "value"]),
    zero_grad=st.sampled_from(["none", "zero", "model"]),
    smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from(["mean", "sum"]),
    foreign=st.sampled_from([None, None, None, "penalty", "noise"]),
    skip=st.sampled_from([None, None, 1]),
    factor=st.sampled_from([1.0, 0.7]),
    closure=flag,
    aside=flag,
    two_groups=flag,
)


def little_directory():
    """In memory where that can be: a disk takes longer to make and remove a run's hundred files than all else takes."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def make_model(name, dtype):
    torch.manual_seed(3)
    return MODELS[name]().to(dtype)


def make_optimizers(model, choice, loop):
    make, options = choice
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if make is optim.Muon:
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        return [make(matrices, **options), optim.AdamW(others, lr=0.02)]
    if not loop.two_groups:
        return [make(parameters, **options)]
    return [make([{"params": parameters[:1], "lr": options["lr"] / 2}, {"params": parameters[1:]}], **options)]


def train(model, optimizers, loop, recorder):
    dtype = next(model.parameters()).dtype
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [parameter for group in groups for parameter in group["params"]]

    def logits(rows):
        output = model(FEATURES[rows].to(dtype))
        return output["logits"] if isinstance(output, dict) else output

    def gradient(step):
        if loop.zero_grad == "model":
            model.zero_grad()
        else:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=loop.zero_grad == "none")
        for rows in step:
            recorder.examples(rows)
            loss = F.cross_entropy(
                logits(rows), LABELS[rows], label_smoothing=loop.smoothing, reduction=loop.reduction
            ) / len(step)
            if loop.foreign == "penalty":
                loss = loss + 0.01 * sum(parameter.square().sum() for parameter in owned)
            loss.backward()
            if loop.aside:
                logits(rows)
        if loop.foreign == "noise":
            for parameter in owned:
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter), alpha=0.01)
        if loop.clip == "norm":
            nn.utils.clip_grad_norm_(owned, 0.1)
        elif loop.clip == "each norm":
            for parameter in owned:
                nn.utils.clip_grad_norm_([parameter], 0.05)
        elif loop.clip == "value":
            nn.utils.clip_grad_value_(owned, 0.02)
        return loss.detach()

    torch.manual_seed(11)
    for number, step in enumerate(loop.steps):
        if number == loop.skip:
            gradient(step)
        elif loop.closure and len(optimizers) == 1:
            optimizers[0].step(lambda step=step: gradient(step))
        else:
            gradient(step)
            for optimizer in optimizers:
                optimizer.step()
        for group in groups:
            group["lr"] *= loop.factor


class _Untraced:
    """In place of a recorder."""

    def examples(self, ids):
        pass


def recorded(directory, name, choice, loop, dtype=torch.float64, **options):
    model = make_model(name, dtype)
    optimizers = make_optimizers(model, choice, loop)
    path = Path(directory) / "run.zarr"
    with explaind.trace(model, optimizers, path, overwrite=True, **options) as recorder:
        train(model, optimizers, loop, recorder)
    return explaind.open_run(path, model=make_model(name, dtype)), model


def query(name, dtype=torch.float64):
    output = explaind.outputs.log_prob([0, 1])
    return explaind.Query(FEATURES[:2].to(dtype), output=output.of("logits") if name == "tied" else output)


def few_numbers(name, loop):
    """Of one number that was rescaled alone, or two of one size, nothing can tell a factor from noise."""
    return name in ("residual", "convolution") and loop.clip == "each norm"


@contextlib.contextmanager
def expected(foreign):
    """What a penalty or noise adds is warned about."""
    with warnings.catch_warnings():
        if foreign:
            warnings.simplefilter("ignore", explaind.errors.UnattributedWarning)
        yield


def check_closure(run, model, name, choice, loop, dtype):
    """The terms sum to the prediction, nothing is left over, and the recorder has changed nothing."""
    single = dtype == torch.float32
    untraced = make_model(name, dtype)
    train(untraced, make_optimizers(untraced, choice, loop), loop, _Untraced())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untraced.parameters(), strict=True))
    assert run.verify().exact_updates == run.num_steps
    result = run.attribute(query(name, dtype), by=("query", "example", "step", "layer"))
    with expected(loop.foreign or few_numbers(name, loop)):
        closure = result.check()
    if loop.foreign is None and not few_numbers(name, loop):
        assert closure.other <= (1e-4 if single else 1e-10)
    late = run.attribute(query(name, dtype), by=("query", "example", "update_step", "layer"))
    with expected(loop.foreign or few_numbers(name, loop)):
        late.check()
    difference = late.dataset.contribution.sum("update_step") - result.dataset.contribution.sum("step")
    size = float(np.abs(result.dataset.contribution).sum())
    rounding = float(np.abs(late.dataset.rounding).sum() + np.abs(result.dataset.rounding).sum())
    assert float(np.abs(difference).max()) <= (1e-4 if single else 1e-7) * size + rounding


def check_order(run, name, choice, loop, shuffled):
    """Each example's contributions are the same with the rows and micro-batches of every step in another order."""
    fixed = explaind.quadrature.gauss_legendre(2)
    with little_directory() as directory:
        other, _ = recorded(directory, name, choice, replace(loop, steps=shuffled))
        one, two = (
            each.attribute(query(name), by=("query", "example", "step", "layer"), quadrature=fixed).dataset.contribution
            for each in (run, other)
        )
    assert float(np.abs(one - two).max()) <= 1e-6 * max(float(np.abs(one).sum()), 1e-3)


@pytest.mark.timeout(600 + 3 * NUM_DRAWS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)  # of which hundreds of draws, many like the one before, miss some
@settings(drawn, max_examples=math.ceil(NUM_DRAWS / len(OPTIMIZERS)))
@given(
    name=st.sampled_from(sorted(MODELS)),
    choices=st.data(),
    loop=loops,
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    storage=st.sampled_from(["replayed", "replayed", "stored"]),
    seed=st.integers(0, 1 << 16),
)
def test_every_run_closes_whatever_the_order_of_rows(optimizer, name, choices, loop, dtype, storage, seed):
    choice = choices.draw(OPTIMIZERS[optimizer], label="choice")
    with little_directory() as directory:
        run, model = recorded(directory, name, choice, loop, dtype, example_grads=storage)
        check_closure(run, model, name, choice, loop, dtype)
        if dtype == torch.float64 and name in SEPARATE and choice[0] not in DISCONTINUOUS:
            random = np.random.default_rng(seed)
            shuffled = [
                [random.permutation(step[place]).tolist() for place in random.permutation(len(step))]
                for step in loop.steps
            ]
            check_order(run, name, choice, loop, shuffled)


def test_gradients_that_float32_cannot_give_are_taken_in_float64(tmp_path):
    # The path is short against the products along it, so that their rounding in float32 is 4e-5 of it.
    choice = optim.NAdam, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.5, 0.5), "eps": 1e-8}
    loop = Loop(
        steps=[[[0, 0], [0, 1, 5, 5]]],
        clip=None,
        zero_grad="none",
        smoothing=0.2,
        reduction="mean",
        foreign=None,
        skip=None,
        factor=1.0,
        closure=False,
        aside=False,
        two_groups=False,
    )
    run, model = recorded(tmp_path, "tanh", choice, loop, torch.float32)
    check_closure(run, model, "tanh", choice, loop, torch.float32)
