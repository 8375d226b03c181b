"""A run that is interrupted and resumed is, bit for bit, the run that would have been without."""

import random
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import explaind
from explaind.errors import (
    DamagedStoreWarning,
    ModelMismatchError,
    RecordingError,
    ResumeError,
    StoreExistsError,
    StoreInUseError,
)
from explaind.recording import boundaries, writer
from explaind.store import StoreReader
from tests.cases import chunks_of, data, mlp
from tests.traced import (
    FEATURES,
    LABELS,
    batchnorm_mlp,
    change_attributes,
    change_commit,
    dropout_mlp,
    momentum_sgd,
    same,
    step_on,
    with_buffer,
)
from tests.unfreezing import frozen_backbone, unfreeze

IN_TIME = ("loop_point", "loop_state", "state", "state_step", "state_scalar", "state_present")
"""Arrays whose rows depend on when blocks were published, or where a run was resumed."""


DATA = data()


@pytest.fixture(scope="module", autouse=True)
def points_everywhere():
    """A point between all steps, however short they are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(boundaries, "_SHARE", float("inf"))
        patched.setattr(writer, "_CHEAP_SECONDS", 10.0)  # all blocks are published, also where that is slow
        yield


class Stopped(Exception):
    pass


@dataclass
class Loop:
    """A training that may be stopped: `stop(recorder, where)` is called after each forward pass and each step."""

    path: Any
    options: dict[str, Any] = field(default_factory=dict)
    make: Any = mlp
    make_optimizer: Any = momentum_sgd
    epochs: int = 3
    drop_last: bool = False
    stop: Any = lambda recorder, where: None
    recorder: Any = None

    def __call__(self, body, **options):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        model = self.make()
        made = self.make_optimizer(model)
        optimizers = made if isinstance(made, list) else [made]
        with explaind.trace(model, made, self.path, **self.options | options) as self.recorder:
            body(self, self.recorder, model, *optimizers)
        return model

    def at(self, where):
        self.stop(self.recorder, where)

    def step(self, recorder, model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        self.at("forward")
        loss.backward()
        optimizer.step()
        self.at("step")


def loader(**options):
    return DataLoader(DATA, **{"batch_size": 4, "shuffle": True} | options)


def plain(loop, recorder, model, optimizer):
    batches = loader(drop_last=loop.drop_last)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def seeded(loop, recorder, model, optimizer):
    batches = loader(generator=torch.Generator().manual_seed(2))
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def with_replacement(loop, recorder, model, optimizer):
    generator = torch.Generator().manual_seed(2)
    sampler = torch.utils.data.RandomSampler(DATA, replacement=True, num_samples=10, generator=generator)
    batches = loader(shuffle=None, sampler=sampler)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x + torch.rand(1, generator=generator), y)


def workers(loop, recorder, model, optimizer):
    batches = loader(num_workers=1)
    for _ in range(2):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def scheduled(loop, recorder, model, optimizer):
    by_step, by_epoch = StepLR(optimizer, 2, 0.5), MultiStepLR(optimizer, [1, 2], 0.3)
    recorder.keep(by_step, by_epoch)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
            by_step.step()
        by_epoch.step()


def not_kept_scheduler(loop, recorder, model, optimizer):
    scheduler = StepLR(optimizer, 1, 0.5)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
        scheduler.step()


def averaged(loop, recorder, model, optimizer):
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    recorder.keep(ema, plateau)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
            ema.update_parameters(model)
        with torch.no_grad():
            plateau.step(F.cross_entropy(ema(FEATURES), LABELS))
    model.register_buffer("ema", torch.cat([p.detach().reshape(-1) for p in ema.parameters()]))


def accumulated(loop, recorder, model, optimizer):
    seen = []
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader(batch_size=2, drop_last=True)):
            F.cross_entropy(model(x), y).backward()
            loop.at("forward")
            if len(seen := [*seen, x]) % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
                loop.at("step")


def closures(loop, recorder, model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loop.at("forward")
        loss.backward()
        return loss

    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):  # noqa: B007
            optimizer.step(closure)
            loop.at("step")


def scaled(loop, recorder, model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    recorder.keep(scaler)
    for _ in range(5):
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            overflow = torch.inf if y.sum() % 3 == 1 else 1.0
            scaler.scale(F.cross_entropy(model(x), y) * overflow).backward()
            loop.at("forward")
            scaler.step(optimizer)
            scaler.update()
            loop.at("step")


def two_steps_for_a_batch(loop, recorder, model, optimizer):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
            loop.step(recorder, model, optimizer, x, y)


def projected(loop, recorder, model, optimizer):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
            loop.step(recorder, model, optimizer, x, y)
            with torch.no_grad():
                model[0].bias.add_(torch.randn_like(model[0].bias), alpha=0.01)


def by_hand(loop, recorder, model, optimizer):
    while recorder.num_steps < 9:
        ids = torch.randint(len(FEATURES), (4,))
        recorder.examples(ids)
        loop.step(recorder, model, optimizer, FEATURES[ids], LABELS[ids])


def by_content(loop, recorder, model, optimizer):
    scheduler = CosineAnnealingLR(optimizer, 9)
    recorder.keep(scheduler)
    for step in range(recorder.num_steps, 9):
        rows = [(step + number) % 7 for number in range(3)]
        loop.step(recorder, model, optimizer, FEATURES[rows], LABELS[rows])
        scheduler.step()


def own_generator(loop, recorder, model, optimizer):
    generator = torch.Generator().manual_seed(8)
    recorder.keep(generator)
    while recorder.num_steps < 9:
        ids = torch.randint(len(FEATURES), (4,), generator=generator)
        loop.step(recorder, model, optimizer, FEATURES[ids], LABELS[ids])


def zeroed_in_place(loop, recorder, model, optimizer):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad(set_to_none=False)
            output = model(x) if recorder.num_steps < 4 else model[2](model[1](model[0](x).detach()))
            if recorder.num_steps >= 4:
                output = model(x) * 0 + output
            F.cross_entropy(output, y).backward()
            loop.at("forward")
            optimizer.step()
            loop.at("step")


class Augmented(Dataset):
    """Draws from all generators that there are."""

    def __len__(self):
        return len(FEATURES)

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return FEATURES[index] + 0.1 * noise, LABELS[index]


def augmented(loop, recorder, model, optimizer):
    batches = DataLoader(Augmented(), batch_size=4, shuffle=True)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def several_kinds(loop, recorder, model, optimizer):
    tokens = torch.arange(12).reshape(3, 4) % 5
    while recorder.num_steps < 8:
        step = recorder.num_steps
        optimizer.zero_grad()
        length = 2 + step // 2 % 3
        rows = tokens[:, :length] + step % 2
        model(rows).logsumexp(-1).sum().backward()
        loop.at("forward")
        optimizer.step()
        loop.at("step")


def embedding():
    return nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)).double()


def adamw(model):
    return AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


def two_optimizers(model):
    return [SGD(model[0].parameters(), lr=0.1, momentum=0.9), Adam(model[2].parameters(), lr=0.05)]


def in_rounds(loop, recorder, model, *optimizers):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            loop.at("forward")
            for optimizer in optimizers:
                optimizer.step()
            loop.at("step")


def sum_of_losses(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none") / len(x)


CASES = {
    "plain": (plain, {}),
    "generator": (seeded, {}),
    "replacement": (with_replacement, {}),
    "dropout": (plain, {"make": dropout_mlp}),
    "batch norm": (plain, {"drop_last": True, "epochs": 4, "make": batchnorm_mlp, "make_optimizer": adamw}),
    "schedulers": (scheduled, {"make_optimizer": adamw}),
    "scheduler not kept": (not_kept_scheduler, {}),
    "averages": (averaged, {}),
    "accumulation": (accumulated, {}),
    "closure": (closures, {}),
    "scaler": (scaled, {}),
    "two steps for a batch": (two_steps_for_a_batch, {}),
    "weights that the loop changes": (projected, {}),
    "by hand": (by_hand, {"make": dropout_mlp}),
    "by content": (by_content, {}),
    "own generator": (own_generator, {}),
    "zeroed in place": (zeroed_in_place, {"make_optimizer": adamw}),
    "augmented": (augmented, {"make": dropout_mlp}),
    "several kinds of calls": (several_kinds, {"make": embedding}),
    "two optimizers": (in_rounds, {"make_optimizer": two_optimizers}),
    "snapshots": (
        plain,
        {
            "drop_last": True,
            "epochs": 4,
            "make": batchnorm_mlp,
            "make_optimizer": adamw,
            "options": {"snapshot_every": 3},
        },
    ),
    "stored gradients": (plain, {"options": {"example_grads": "stored"}}),
    "objective": (plain, {"options": {"objective": sum_of_losses}}),
    "durable": (plain, {"options": {"durable": True}}),
}


def assert_same_run(path, other, *, but=()):
    """All rows of two stores are the same, but for those that depend on the time."""
    one, two = StoreReader(path), StoreReader(other)
    assert one.commit.complete
    assert one.commit.arrays.keys() == two.commit.arrays.keys()
    for name in one.commit.arrays:
        if name.partition("/")[0] not in (*IN_TIME, *but):
            assert one.read(name).shape == two.read(name).shape, name
            assert one.read(name).tobytes() == two.read(name).tobytes(), name
    for name in ("parameters", "fixed", "groups", "group_keys", "call_kinds", "input_layouts"):
        assert one.attributes.get(name) == two.attributes.get(name)


def assert_same_weights(one, other):
    assert same(one.state_dict(), other.state_dict())


def stop_at(where, num_steps, left=None):
    """Stop a loop; copies to `left` what would be there if its process had been killed."""

    def stop(recorder, now):
        if (now, recorder.num_steps) == (where, num_steps):
            if left is not None:
                recorder._rows._writer.wait()
                shutil.copytree(recorder.path, left)
            raise Stopped

    return stop


@pytest.mark.parametrize("name", CASES)
def test_a_loop_that_was_stopped_goes_on_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    body, settings = CASES[name]
    options, make = settings.get("options", {}), settings.get("make", mlp)
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1000)
    chunks_of(monkeypatch, 700)
    whole = Loop(tmp_path / "whole", **settings)(body)
    other = explaind.open_run(tmp_path / "whole", model=make())
    for left, stop in {"run": stop_at("step", 2), "killed": stop_at("forward", 5, tmp_path / "killed")}.items():
        with pytest.raises(Stopped):
            Loop(tmp_path / "run", **settings, stop=stop)(body, overwrite=True)
        resumed = Loop(tmp_path / left, **settings)(body, resume=True)
        assert_same_weights(resumed, whole)
        assert_same_run(
            tmp_path / left, tmp_path / "whole", but=("params", "snapshot_step") if "snapshot_every" in options else ()
        )
        run = explaind.open_run(tmp_path / left, model=make(), objective=options.get("objective"))
        assert all(torch.equal(run.flat_params(step), other.flat_params(step)) for step in range(run.num_steps + 1))
        assert same(run.state(run.num_steps), other.state(run.num_steps))
        if body not in (projected, zeroed_in_place):  # whose movement is not all the optimizer's
            assert run.verify().bit_exact


# ---------------------------------------------------------------------- begin, go on, go further


def test_a_script_can_be_started_again_and_again(tmp_path):
    path, restored = tmp_path / "run", []

    def body(loop, recorder, model, optimizer):
        restored.append(recorder.restore())
        plain(loop, recorder, model, optimizer)

    for num_steps in (0, 1, 4):
        with pytest.raises(Stopped):
            Loop(path, stop=stop_at("forward", num_steps))(body, resume=True)
    for epochs in (3, 3, 5):
        model = Loop(path, epochs=epochs)(body, resume=True)
        assert_same_weights(model, Loop(tmp_path / "whole", epochs=epochs)(plain, overwrite=True))
        assert_same_run(path, tmp_path / "whole")
    assert restored == [0, 0, 1, 4, 9, 9]
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["run", "whole"]


def test_a_complete_run_goes_on_where_its_schedulers_were(tmp_path):
    Loop(tmp_path / "run", epochs=1)(scheduled)
    model = Loop(tmp_path / "run")(scheduled, resume=True)
    assert_same_weights(model, Loop(tmp_path / "whole")(scheduled))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_loop_that_left_a_loader_early_goes_on_within_it(tmp_path):
    def body(num_steps):
        def train(loop, recorder, model, optimizer):
            batches = loader()
            while recorder.num_steps < num_steps:
                for x, y in recorder.batches(batches):
                    if recorder.num_steps == num_steps:
                        break
                    loop.step(recorder, model, optimizer, x, y)

        return train

    Loop(tmp_path / "run")(body(4))
    assert_same_weights(Loop(tmp_path / "run")(body(8), resume=True), Loop(tmp_path / "whole")(body(8)))


def test_all_is_put_back(tmp_path):
    with pytest.raises(Stopped):
        Loop(tmp_path / "run", make=batchnorm_mlp, drop_last=True, stop=stop_at("forward", 3))(plain)
    run = explaind.open_run(tmp_path / "run", model=batchnorm_mlp())

    def body(loop, recorder, model, optimizer):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        optimizer.param_groups[0]["lr"] = 7.0
        step = recorder.restore()
        assert step == 3
        assert same(run.params(step), {name: p.detach() for name, p in model.named_parameters()})
        assert optimizer.param_groups[0]["lr"] == 0.2
        assert model[1].num_batches_tracked == step
        assert same(run.state(step), {n: optimizer.state[p] for n, p in model.named_parameters()})

    Loop(tmp_path / "run", make=batchnorm_mlp)(body, resume=True)
    assert explaind.open_run(tmp_path / "run", model=batchnorm_mlp()).verify().bit_exact


def test_groups_that_were_added_midway_are_to_be_added_before(tmp_path):
    def body(loop, recorder, model, optimizer):
        for epoch in range(3):
            if epoch == 1 and len(optimizer.param_groups) == 1:
                unfreeze(model, optimizer, lr=0.1)
            for x, y in recorder.batches(loader()):
                loop.step(recorder, model, optimizer, x, y)

    def narrow(model):
        return SGD(model[2].parameters(), lr=0.2, momentum=0.9)

    def wide(model):
        optimizer = narrow(model)
        unfreeze(model, optimizer, lr=0.1)
        return optimizer

    whole = Loop(tmp_path / "whole", make=frozen_backbone, make_optimizer=narrow)(body)
    with pytest.raises(Stopped):
        Loop(tmp_path / "run", make=frozen_backbone, make_optimizer=narrow, stop=stop_at("step", 7))(body)
    with pytest.raises(ResumeError, match=r"has 1 parameter groups, in the run .* 2\. Groups that were added while"):
        Loop(tmp_path / "run", make=frozen_backbone, make_optimizer=narrow)(body, resume=True)
    resumed = Loop(tmp_path / "run", make=frozen_backbone, make_optimizer=wide)(body, resume=True)
    assert_same_weights(resumed, whole)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_is_lost_is_recorded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    chunks_of(monkeypatch, 300)
    whole = Loop(tmp_path / "whole")(plain)
    with pytest.raises(Stopped):
        Loop(tmp_path / "run", stop=stop_at("forward", 7, tmp_path / "killed"))(plain)
    newest = max((tmp_path / "killed/params/c").iterdir(), key=lambda file: int(file.name))
    shutil.rmtree(newest)
    with pytest.warns(DamagedStoreWarning, match="the newest steps of .* are lost"):
        resumed = Loop(tmp_path / "killed")(plain, resume=True)
    assert_same_weights(resumed, whole)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_run_that_goes_on_elsewhere_claims_nothing_about_rounding(tmp_path):
    with pytest.raises(Stopped):
        Loop(tmp_path / "run", stop=stop_at("forward", 4))(plain)
    change_attributes(tmp_path / "run", lambda attributes: attributes.update(machine="another one"))
    Loop(tmp_path / "run")(plain, resume=True)
    attributes = StoreReader(tmp_path / "run").attributes
    assert attributes["machine"].startswith("another one; then ")
    assert explaind.open_run(tmp_path / "run", model=mlp()).verify().exact_updates == 9


def test_a_random_data_set_that_cannot_be_drawn_again_is_no_other_one(tmp_path):
    class Noisy(Dataset):
        def __len__(self):
            return len(FEATURES)

        def __getitem__(self, index):
            return FEATURES[index] + torch.from_numpy(np.random.default_rng().random(3)), LABELS[index]

    def body(loop, recorder, model, optimizer):
        batches = DataLoader(Noisy(), batch_size=4)
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)

    with pytest.raises(Stopped):
        Loop(tmp_path / "run", stop=stop_at("forward", 2))(body)
    Loop(tmp_path / "run")(body, resume=True)
    assert explaind.open_run(tmp_path / "run", model=mlp()).verify().bit_exact


def test_metadata_is_added_to(tmp_path):
    Loop(tmp_path / "run", epochs=1)(plain, metadata={"a": 1, "b": 1})
    Loop(tmp_path / "run", epochs=1)(plain, metadata={"b": 2}, resume=True)
    assert explaind.open_run(tmp_path / "run").metadata == {"a": 1, "b": 2}


# ---------------------------------------------------------------------- refusals


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
