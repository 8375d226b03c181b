"""Loops over models and optimizers in other numbers, or that change on the way."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import explaind
from tests.loops.problem import ADAMW, FEATURES, MOMENTUM, VALIDATION, loader, mlp, query, step, traced
from tests.loops.row import Rows, Traced

SETUPS = Rows()

# ---------------------------------------------------------------------- several models


@SETUPS.row("two models with two optimizers (a GAN)")
def two_models(**options):
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    make = SGD(generator.parameters(), lr=0.1, momentum=0.5)
    judge = Adam(critic.parameters(), lr=0.02)
    real, fake = torch.ones(9, 1, dtype=torch.float64), torch.zeros(9, 1, dtype=torch.float64)
    with explaind.trace(generator, make, **options) as made, explaind.trace(critic, judge, **options) as judged:
        for _ in range(3):
            noise = torch.randn(9, 2, dtype=torch.float64)
            judge.zero_grad()
            loss = F.binary_cross_entropy_with_logits(critic(FEATURES), real)
            (loss + F.binary_cross_entropy_with_logits(critic(generator(noise).detach()), fake)).backward()
            judge.step()
            make.zero_grad()
            F.binary_cross_entropy_with_logits(critic(generator(noise)), real).backward()
            make.step()
    value = explaind.outputs.value()
    return [
        Traced(made.path, generator, explaind.Query(VALIDATION[:, :2], output=value)),
        Traced(judged.path, critic, explaind.Query(VALIDATION, output=value)),
    ]


@SETUPS.row("one optimizer over two modules")
def two_modules(**options):
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    decoder = nn.Linear(4, 3).double()
    optimizer = AdamW([*encoder.parameters(), *decoder.parameters()], lr=0.05)
    parts = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    with explaind.trace(parts, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(decoder(encoder(x)), y).backward()
            optimizer.step()
    question = explaind.Query(
        VALIDATION,
        output=explaind.outputs.log_prob([0, 2]),
        forward=lambda parts, x: parts["decoder"](parts["encoder"](x)),
    )
    return Traced(recorder.path, parts, question)


# ---------------------------------------------------------------------- frozen layers and new groups


def frozen_backbone():
    model = mlp()
    model[0].requires_grad_(False)
    return model


@SETUPS.row("parameter groups added midway")
@traced(lambda model: MOMENTUM(model[2]), make=frozen_backbone)
def groups_midway(model, optimizer, recorder):
    for epoch in range(2):
        for x, y in recorder.batches(loader()):
            step(model, optimizer, x, y)
        if epoch == 0:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})


@SETUPS.row("a layer frozen for one of two losses")
@traced(ADAMW)
def frozen_for_one_loss(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        model[2].requires_grad_(False)
        model(x).square().mean().backward()
        model[2].requires_grad_(True)
        optimizer.step()


@SETUPS.row("a layer frozen midway")
@traced(ADAMW)
def frozen_midway(model, optimizer, recorder):
    for epoch in range(2):
        model[0].requires_grad_(epoch == 0)
        for x, y in recorder.batches(loader()):
            step(model, optimizer, x, y)


@SETUPS.row("a layer frozen midway, with gradients of zero")
@traced(ADAMW)
def frozen_with_zeros(model, optimizer, recorder):
    for epoch in range(2):
        model[0].requires_grad_(epoch == 0)
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# ---------------------------------------------------------------------- schedules and averages


def two_epochs(model, optimizer, after_step, **options):
    batches = loader()
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(2):
            for x, y in recorder.batches(batches):
                step(model, optimizer, x, y)
                after_step()
    return Traced(recorder.path, model, query())


@SETUPS.row("schedules of learning rate and weight decay")
def schedules(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5)

    def after_step():
        scheduler.step()
        optimizer.param_groups[0]["weight_decay"] *= 0.8

    return two_epochs(model, optimizer, after_step, **options)


@SETUPS.row("a one-cycle schedule, which moves the momentum too")
def one_cycle(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=0.3, total_steps=6)
    return two_epochs(model, optimizer, scheduler.step, **options)


@SETUPS.row("exponential moving average of the weights")
def moving_average(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            step(model, optimizer, x, y)
            averaged.update_parameters(model)
    return Traced(recorder.path, model, query(), average=explaind.averages.ema(0.9))


@SETUPS.row("stochastic weight averaging")
def weight_averaging(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    averaged = AveragedModel(model)
    batches = loader()
    with explaind.trace(model, optimizer, **options) as recorder:
        for epoch in range(2):
            for x, y in recorder.batches(batches):
                step(model, optimizer, x, y)
                if epoch == 1:
                    averaged.update_parameters(model)
    return Traced(recorder.path, model, query(), average=explaind.averages.swa(start=3))
