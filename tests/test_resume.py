"""A run that is interrupted and resumed is, bit for bit, the run that would have been without."""

import shutil

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

import explaind
from explaind.errors import (
    DamagedStoreWarning,
    ResumeError,
)
from explaind.recording import writer
from explaind.store import StoreReader
from tests.cases import chunks_of, mlp
from tests.resumed import (
    CASES,
    Loop,
    Stopped,
    assert_same_run,
    assert_same_weights,
    loader,
    plain,
    points_everywhere,
    projected,
    scheduled,
    stop_at,
    zeroed_in_place,
)
from tests.traced import (
    FEATURES,
    LABELS,
    batchnorm_mlp,
    change_attributes,
    same,
)
from tests.unfreezing import frozen_backbone, unfreeze


@pytest.fixture(scope="module", autouse=True)
def everywhere():
    with points_everywhere():
        yield


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
