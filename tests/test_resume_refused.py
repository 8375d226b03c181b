"""What cannot be gone on with is refused: another model, optimizer, data set or option, and it says which."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR, StepLR
from torch.utils.data import DataLoader, Dataset

import explaind
from explaind.errors import (
    ModelMismatchError,
    RecordingError,
    ResumeError,
    StoreExistsError,
    StoreInUseError,
)
from tests.cases import mlp
from tests.resumed import (
    DATA,
    Loop,
    Stopped,
    adamw,
    assert_same_weights,
    loader,
    plain,
    points_everywhere,
    stop_at,
    sum_of_losses,
)
from tests.traced import (
    FEATURES,
    LABELS,
    change_commit,
    momentum_sgd,
    step_on,
    with_buffer,
)


@pytest.fixture(scope="module", autouse=True)
def everywhere():
    with points_everywhere():
        yield


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run of which a step of the second epoch is missing."""
    path = tmp_path_factory.mktemp("left") / "run"
    with pytest.raises(Stopped):
        Loop(path, stop=stop_at("forward", 5))(plain)
    return path


@pytest.fixture
def copied(left, tmp_path):
    return shutil.copytree(left, tmp_path / "run")


def snapshot(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refused(path, error, match, body=plain, *, changes=False, make=mlp, make_optimizer=momentum_sgd, **options):
    before = snapshot(path)
    with pytest.raises(error, match=match):
        Loop(path, make=make, make_optimizer=make_optimizer)(body, resume=True, **options)
    assert changes or snapshot(path) == before
    assert not path.with_name(f"{path.name}.lock").exists()


def longer():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rectified():
    return mlp(nn.ReLU)


@pytest.mark.parametrize(
    "make, match",
    [
        (
            longer,
            r"'0\.weight' was recorded with \(shape, type\) \(\(4, 3\), torch\.float64\), the model's has \(\(5, 3\)",
        ),
        (rectified, "the module '1' is ReLU in the model and Tanh in the run"),
        (with_buffer, "the model has 'scale', which the run at .* did not record"),
        (lambda: mlp(dtype=torch.float32), "torch.float64.*torch.float32"),
    ],
)
def test_another_model_is_refused(make, match, copied):
    refused(copied, ModelMismatchError, match, make=make)


def split(model):
    return SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.2, momentum=0.9)


@pytest.mark.parametrize(
    "make_optimizer, match",
    [
        (adamw, r"group 0 is torch\.optim\.adamw\.AdamW, in the run at .* it is torch\.optim\.sgd\.SGD"),
        (split, "the optimizer has 2 parameter groups, in the run at .* it has 1"),
        (
            lambda model: SGD(model.parameters(), lr=0.3, momentum=0.9),
            r"'lr' of parameter group 0 is 0\.3, .* was 0\.2",
        ),
        (lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True), "'nesterov' .* is True"),
        (lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9, foreach=False), "'foreach' .* is False"),
    ],
)
def test_another_optimizer_is_refused(make_optimizer, match, copied):
    refused(copied, ResumeError, match, make_optimizer=make_optimizer)


def test_parameters_in_other_groups_are_refused(tmp_path):
    def exchanged(model):
        return SGD([{"params": model[2].parameters()}, {"params": model[0].parameters()}], lr=0.2, momentum=0.9)

    Loop(tmp_path / "run", make_optimizer=split)(plain)
    refused(
        tmp_path / "run",
        ResumeError,
        r"'0\.weight' is in group 1 of the optimizer, .* group 0",
        make_optimizer=exchanged,
    )


@pytest.mark.parametrize(
    "options, match",
    [
        ({"snapshot_every": 2}, "was recorded with snapshot_every=1, and is to be resumed with 2"),
        ({"example_grads": "stored"}, "was recorded with example_grads='replayed'"),
        ({"objective": sum_of_losses}, "was recorded without an objective, and is to be resumed with one"),
    ],
)
def test_other_options_are_refused(options, match, copied):
    refused(copied, ResumeError, match, **options)


class Changed(Dataset):
    """The data with another label of example 6."""

    def __len__(self):
        return len(FEATURES)

    def __getitem__(self, index):
        return FEATURES[index], LABELS[index] if index != 6 else (LABELS[index] + 1) % 3


CHANGED, FEW = Changed(), torch.utils.data.Subset(DATA, range(5))


def over(make_loader):
    def body(loop, recorder, model, optimizer):
        for _ in range(loop.epochs):
            for x, y in recorder.batches(make_loader()):
                loop.step(recorder, model, optimizer, x, y)

    return body


@pytest.mark.parametrize(
    "make_loader, match",
    [
        (lambda: loader(shuffle=False), r"in the batch of step \d, row \d was example \d and is example \d"),
        (lambda: loader(batch_size=3), r"in the batch of step 3, row 3 was example \d and is no more than 3 examples"),
        (lambda: DataLoader(FEW, batch_size=4, shuffle=True), "does not give what"),
    ],
)
def test_batches_in_another_order_are_refused(make_loader, match, copied):
    refused(copied, ResumeError, match, over(make_loader), changes=True)
    resumed = Loop(copied)(plain, resume=True)
    assert_same_weights(resumed, Loop(copied.with_name("whole"))(plain))


def test_other_data_is_refused(tmp_path):
    with pytest.raises(Stopped):
        Loop(tmp_path / "run", stop=stop_at("forward", 5))(over(lambda: loader(shuffle=False)))
    changed = over(lambda: DataLoader(CHANGED, batch_size=4))
    match = "example 6, which was in the batch of step 4, holds something else now"
    refused(tmp_path / "run", ResumeError, match, changed, changes=True)


def test_other_data_after_whole_epochs_is_refused(tmp_path):
    Loop(tmp_path / "run", epochs=2)(over(lambda: loader(batch_size=9)))
    changed = over(lambda: DataLoader(CHANGED, batch_size=9, shuffle=True))
    refused(tmp_path / "run", ResumeError, "example 6, which was in the batch of step 1,", changed, changes=True)
    few = over(lambda: DataLoader(FEW, batch_size=9, shuffle=True))
    refused(tmp_path / "run", ResumeError, "does not have all examples of the batch of step 1", few, changes=True)


def test_a_loop_that_does_not_come_to_its_batches_is_refused(copied):
    def body(loop, recorder, model, optimizer):
        step_on(model, optimizer, slice(0, 3))

    refused(copied, RecordingError, r"goes on at batch \d of iteration 1 of recorder\.batches", body, changes=True)


def test_weights_that_are_not_those_of_the_run_are_refused(tmp_path):
    def body(loop, recorder, model, optimizer):
        if recorder.num_steps:
            model[2].bias.data.add_(1.0)
        step_on(model, optimizer, slice(0, 3))

    Loop(tmp_path / "run")(body)
    refused(tmp_path / "run", RecordingError, r"'2\.bias' is not what it was after 1 steps", body, changes=True)
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert run.num_steps == 1
    assert run.verify().bit_exact


def keeping(*make):
    def body(loop, recorder, model, optimizer):
        recorder.keep(*(make_one(optimizer) for make_one in make))
        plain(loop, recorder, model, optimizer)

    return body


def by_step(optimizer):
    return StepLR(optimizer, 100)


def by_epoch(optimizer):
    return MultiStepLR(optimizer, [100])


@pytest.mark.parametrize(
    "before, now, match",
    [
        ([by_step], [by_epoch], "got a MultiStepLR where the recording has kept StepLR"),
        ([by_step], [], "has kept a StepLR, which is missing now"),
        ([], [by_step], "got a StepLR where the recording has kept no other object"),
    ],
)
def test_other_objects_are_refused(before, now, match, tmp_path):
    def make_optimizer(model):  # schedulers leave something in its settings
        return SGD([{"params": model.parameters(), "initial_lr": 0.2}], lr=0.2, momentum=0.9)

    with pytest.raises(Stopped):
        Loop(tmp_path / "run", make_optimizer=make_optimizer, stop=stop_at("forward", 4))(keeping(*before))
    refused(tmp_path / "run", ResumeError, match, keeping(*now), changes=True, make_optimizer=make_optimizer)


class Odd:
    def state_dict(self):
        return {"open": {"file": object()}}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    "companion, match",
    [
        (3, r"expects objects with state_dict\(\) and load_state_dict\(\), .* got int"),
        (Odd(), r"Odd\['open'\]\['file'\]"),
    ],
)
def test_what_has_no_plain_state_is_not_kept(companion, match, tmp_path):
    with pytest.raises(TypeError, match=match):
        Loop(tmp_path / "run")(keeping(lambda optimizer: companion))


def test_keeping_and_restoring_come_before_the_first_step(tmp_path):
    def body(loop, recorder, model, optimizer):
        step_on(model, optimizer, slice(0, 3))
        with pytest.raises(RecordingError, match=r"recorder\.keep\(…\) comes before the first step"):
            recorder.keep(by_step(optimizer))
        with pytest.raises(RecordingError, match=r"recorder\.restore\(\) comes before the first step"):
            recorder.restore()

    Loop(tmp_path / "run")(body)
    model = mlp()
    recorder = explaind.trace(model, momentum_sgd(model), tmp_path / "run", resume=True)
    with pytest.raises(RecordingError, match="nothing is being recorded"):
        recorder.restore()


def test_one_cannot_go_on_with_what_is_replaced_or_nowhere(tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match="overwrite=True would delete it"):
        explaind.trace(model, momentum_sgd(model), tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(ValueError, match="say at which path it is"):
        explaind.trace(model, momentum_sgd(model), resume=True)


def test_what_is_no_run_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").write_text("mine")
    refused(tmp_path / "run", StoreExistsError, "is not a recorded run, so it cannot be resumed")


def test_a_run_that_is_being_written_is_not_resumed(copied):
    def body(loop, recorder, model, optimizer):
        with pytest.raises(StoreInUseError):
            Loop(copied)(plain, resume=True)
        plain(loop, recorder, model, optimizer)

    Loop(copied)(body, resume=True)


def test_a_run_without_points_says_so(copied):
    def forget(content):
        for part in (content, *content["earlier"]):
            part["arrays"] = {name: tail for name, tail in part["arrays"].items() if not name.startswith("loop_")}

    change_commit(copied, forget)
    refused(copied, ResumeError, "does not say where its loop can go on: it was recorded by an earlier version")


def test_an_earlier_format_is_not_continued(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "data/format-2.zarr.zip") as archive:
        archive.extractall(tmp_path)

    def make():
        return nn.Sequential(
            nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 3)
        )

    refused(tmp_path / "format-2.zarr", ResumeError, "has format 2, which cannot be continued", make=make)


def test_state_that_was_not_recorded_is_named(tmp_path):
    def make_optimizer(model):
        def hoard(optimizer, *_):
            optimizer.state[model[0].bias]["history"] = [0]

        optimizer = SGD(model.parameters(), lr=0.2)
        optimizer.register_step_post_hook(hoard)
        return optimizer

    Loop(tmp_path / "run", make_optimizer=make_optimizer)(plain)
    refused(tmp_path / "run", ResumeError, "the optimizer's state 'history' is not in", make_optimizer=make_optimizer)
