"""The cost of a recording, estimated before it begins."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

import explaind
from explaind.errors import RecordingError
from tests.cases import data, mlp

IMAGES, LABELS = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def normalised():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)]
    return nn.Sequential(*layers)


def size_of(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def train(model, optimizer, path, steps, batch_size=32, **options):
    with explaind.trace(model, optimizer, path, **options):
        for number in range(steps):
            rows = torch.arange(number, number + batch_size) % len(IMAGES)
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES[rows]), LABELS[rows]).backward()
            optimizer.step()


@pytest.mark.parametrize("given", [False, True], ids=["any loss", "the loss"])
@pytest.mark.parametrize("make, grads", [(wide, "replayed"), (wide, "stored"), (normalised, "replayed")])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: SGD(p, lr=0.05), lambda p: SGD(p, lr=0.05, momentum=0.9), lambda p: AdamW(p, lr=1e-3)],
    ids=["sgd", "momentum", "adamw"],
)
def test_the_planned_bytes_are_those_of_the_store(optimizer, make, grads, given, tmp_path):
    model, steps = make(), 12 if grads == "stored" else 40
    made = optimizer(model.parameters())
    loss = {"loss": lambda output: F.cross_entropy(output, LABELS[:32])} if given else {}
    recorder = explaind.trace(model, made, tmp_path / "run", example_grads=grads)
    plan = recorder.plan(IMAGES[:32], steps=steps, examples=64, **loss)
    train(model, made, tmp_path / "run", steps, example_grads=grads)
    assert 1 / 1.5 < plan.total_bytes / size_of(tmp_path / "run") < 1.5
    kinds = {"parameters": "params", "gradient": "gradient", "output gradients": "output_grad"}
    for kind, array in kinds.items():
        assert 1 / 1.5 < plan.bytes_per_step[kind] / (size_of(tmp_path / "run" / array) / steps) < 1.5


@pytest.mark.parametrize("every", [5, 20])
def test_the_planned_bytes_of_a_run_with_few_snapshots(every, tmp_path):
    model, steps = wide(), 40
    optimizer = AdamW(model.parameters(), lr=1e-3)
    recorder = explaind.trace(model, optimizer, tmp_path / "run", snapshot_every=every)
    plan = recorder.plan(IMAGES[:32], steps=steps, examples=64)
    train(model, optimizer, tmp_path / "run", steps, snapshot_every=every)
    assert 1 / 1.5 < plan.total_bytes / size_of(tmp_path / "run") < 1.5
    assert "gradient" not in plan.bytes_per_step


def test_a_plan_counts_each_kind_of_array(tmp_path):
    model = wide()
    trace = explaind.trace(model, AdamW(model.parameters()), tmp_path / "run")
    plan = trace.plan(IMAGES, steps=7, examples=1000)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert plan.steps == 7
    assert plan.total_bytes == 7 * sum(plan.bytes_per_step.values()) + 1000 * plan.bytes_per_example + plan.bytes_once
    assert 0.4 < plan.bytes_per_step["parameters"] / (4 * num_parameters) < 1.1
    assert 0.4 < plan.bytes_per_step["optimizer state"] / (8 * num_parameters / 7) < 1.1  # that of the last moment
    assert 0.4 < plan.bytes_per_step["output gradients"] / (4 * 64 * 10) < 1.1
    assert 0.4 < plan.bytes_per_example / (4 * 64) < 1.1
    assert plan.step_seconds > 0
    assert plan.overhead_seconds >= 0


def test_a_plan_reads_as_text(tmp_path):
    model = wide()
    plan = explaind.trace(model, SGD(model.parameters(), lr=0.1), tmp_path / "run").plan(IMAGES, steps=12_000)
    lines = str(plan).splitlines()
    assert lines[0].startswith("12,000 steps take ")
    assert lines[0].endswith(" on the disk. Each adds")
    assert {line.split()[-1] for line in lines[1:3]} == {"parameters", "gradient"}
    assert "for the inputs of 64 examples." in str(plan)
    assert lines[-1].startswith("A step takes ")


def test_a_plan_changes_nothing(tmp_path):
    model = normalised()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    StepLR(optimizer, 2)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the global generator must stay as it is)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    images = IMAGES.clone()
    recorder = explaind.trace(model, optimizer, tmp_path / "below" / "run")
    recorder.plan(images, steps=3)
    assert list(tmp_path.iterdir()) == []
    after = model.state_dict(), optimizer.state_dict()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1]["param_groups"] == before[1]["param_groups"]
    for number, entries in before[1]["state"].items():
        assert torch.equal(after[1]["state"][number]["momentum_buffer"], entries["momentum_buffer"])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(images, IMAGES)
    assert not model._forward_hooks
    train(model, optimizer, tmp_path / "other", 2)
    assert explaind.open_run(tmp_path / "other", model=normalised()).verify().bit_exact


def test_a_plan_for_an_objective(tmp_path):
    def objective(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[0])

    model = wide()
    recorder = explaind.trace(model, AdamW(model.parameters()), tmp_path / "run", objective=objective)
    plan = recorder.plan(IMAGES, LABELS, steps=10)
    assert plan.examples == 64
    assert "output gradients" not in plan.bytes_per_step


def test_a_plan_of_keyword_arguments_and_two_optimizers(tmp_path):
    model = mlp()
    optimizers = [SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters())]
    plan = explaind.trace(model, optimizers, tmp_path / "run").plan(input=data().tensors[0], steps=5)
    assert plan.examples == 9


def test_a_plan_comes_before_the_recording(tmp_path):
    model = wide()
    recorder = explaind.trace(model, SGD(model.parameters(), lr=0.1), tmp_path / "run")
    with recorder, pytest.raises(RecordingError, match="before the recording begins"):
        recorder.plan(IMAGES, steps=1)


def test_a_plan_needs_a_model_that_is_called(tmp_path):
    parts = nn.ModuleDict({"one": wide()})
    with pytest.raises(RecordingError, match="calls the parts of a container"):
        explaind.trace(parts, SGD(parts.parameters(), lr=0.1), tmp_path / "parts").plan(IMAGES, steps=1)
