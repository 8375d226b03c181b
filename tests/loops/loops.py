"""Training loops as users write them, with `explaind.trace` around them and nothing else changed."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import explaind
from explaind.errors import RecordingError
from tests.loops.problem import FEATURES, LABELS, VALIDATION, loader, mlp, query
from tests.loops.row import Section, Traced

LOOPS = Section("Loops")
HALVES = slice(0, 5), slice(5, 9)

# ---------------------------------------------------------------------- batches


@LOOPS.row("ragged batches")
def ragged_batches(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader(batch_size=4, shuffle=False)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("shuffled full batch")
def shuffled_full_batch(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    batches = loader(batch_size=9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(4):
            for x, y in recorder.batches(batches):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("the same example twice in a batch")
def repeated_examples(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for rows in ([0, 1, 1, 2], [3, 3, 3, 0], [1, 4, 1, 4]):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("several epochs")
def several_epochs(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    batches = loader()
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(2):
            for x, y in recorder.batches(batches):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return Traced(recorder.path, model, query())


# ---------------------------------------------------------------------- forward, backward and step in other numbers


@LOOPS.row("accumulation over uneven micro-batches")
def accumulation(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(2):
            for x, y in zip(FEATURES.split([4, 3, 2]), LABELS.split([4, 3, 2]), strict=True):
                (F.cross_entropy(model(x), y, reduction="sum") / 9).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Traced(recorder.path, model, query())


@LOOPS.row("several forwards before one backward")
def several_forwards(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            first, second = (F.cross_entropy(model(FEATURES[rows]), LABELS[rows]) for rows in HALVES)
            (first * second).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("one batch twice, with other dropout masks")
def consistency(**options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            first, second = model(x), model(x)
            (F.cross_entropy(first, y) + F.mse_loss(first, second)).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("the output fed back as input")
def fed_back(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(model(model(x))), y).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("the output changed in place")
def changed_output(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            output = model(x)
            output /= 0.5
            output[:, 0] -= 1
            F.cross_entropy(output, y).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("batches fetched ahead, for accumulation")
def fetched_ahead(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        batches = recorder.batches(loader(2))
        while micro_batches := list(itertools.islice(batches, 3)):
            optimizer.zero_grad()
            for x, y in micro_batches:
                (F.cross_entropy(model(x), y) / len(micro_batches)).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("several backwards before one step")
def several_backwards(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            output = model(FEATURES)
            F.cross_entropy(output, LABELS).backward(retain_graph=True)
            (0.1 * output.square().mean()).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("forwards that never reach the loss")
def unused_forwards(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            teacher = model(FEATURES).softmax(dim=1).detach()
            model(VALIDATION)
            (F.cross_entropy(model(FEATURES), LABELS) + F.mse_loss(model(-FEATURES), teacher)).backward()
            optimizer.step()
            with torch.no_grad():
                model(VALIDATION)
    return Traced(recorder.path, model, query())


@LOOPS.row("closures")
def closures(**options):
    model = mlp()
    optimizer = Adam(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for rows in HALVES * 2:

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
    return Traced(recorder.path, model, query())


@LOOPS.row("step skipped by the user")
def skipped_step(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for rows in (*HALVES, slice(2, 4), *HALVES):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
            loss.backward()
            if len(LABELS[rows]) > 2:
                optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("`zero_grad` after the step")
def zero_grad_after(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Traced(recorder.path, model, query())


@LOOPS.row("`zero_grad` between forward and backward")
def zero_grad_between(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("`model.zero_grad(set_to_none=False)`")
def zero_grad_in_place(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            model.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


# ---------------------------------------------------------------------- between backward and step


@LOOPS.row("`clip_grad_norm_`")
def clipped_by_norm(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("`clip_grad_norm_` of one layer")
def clipped_layer(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model[0].parameters(), 0.05)
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("`clip_grad_value_`")
def clipped_by_value(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("`GradScaler` with an overflow, unscaling and clipping")
def grad_scaler(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with explaind.trace(model, optimizer, **options) as recorder:
        for number, (x, y) in enumerate(recorder.batches(loader())):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (float("inf") if number == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    return Traced(recorder.path, model, query())


@LOOPS.row("`GradScaler` without unscaling by hand, fused optimizer", dtype=torch.float32)
def fused_grad_scaler(**options):
    model = mlp().float()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    return Traced(recorder.path, model, query(VALIDATION.float()))


@LOOPS.row("autocast to bfloat16", dtype=torch.bfloat16)
def autocast(**options):
    model = mlp().float()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x.float()), y)
            loss.backward()
            optimizer.step()
    return Traced(recorder.path, model, query(VALIDATION.float()))


@LOOPS.row("gradients written by hand")
def gradients_by_hand(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("gradients scaled by a hook")
def hooked_gradients(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model[0].parameters():
        parameter.register_hook(lambda gradient: 0.5 * gradient)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("gradients centralised by hand", foreign=True)
def centralised_gradients(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for weight in (model[0].weight, model[2].weight):
                weight.grad -= weight.grad.mean(dim=1, keepdim=True)
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("sharpness-aware minimisation", refused=RecordingError)
def sharpness_aware(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            F.cross_entropy(model(x), y).backward()
            ascent = [0.05 * parameter.grad for parameter in model.parameters()]
            for sign in (1, -1):
                with torch.no_grad():
                    for parameter, step in zip(model.parameters(), ascent, strict=True):
                        parameter += sign * step
                if sign == 1:
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Traced(recorder.path, model, query())


@LOOPS.row("injected gradient noise", foreign=True)
def gradient_noise(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for parameter in model.parameters():
                parameter.grad += 0.01 * torch.randn_like(parameter)
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("a penalty on the parameters in the loss", foreign=True)
def penalty(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            norm = sum(parameter.abs().sum() for parameter in model.parameters())
            (F.cross_entropy(model(x), y) + 0.01 * norm).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("weights clamped after the step", foreign=True)
def clamped_weights(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-0.5, 0.5)
    return Traced(recorder.path, model, query())


@LOOPS.row("a gradient penalty, by double backward", foreign=True)
def gradient_penalty(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            output = model(x.requires_grad_())
            (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            (F.cross_entropy(output, y) + 0.1 * slope.square().sum()).backward()
            optimizer.step()
    return Traced(recorder.path, model, query())


# ---------------------------------------------------------------------- models and optimizers in other numbers


@LOOPS.row("two models with two optimizers (a GAN)")
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


@LOOPS.row("one optimizer over two modules")
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


@LOOPS.row("parameter groups added midway")
def groups_midway(**options):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = SGD(model[2].parameters(), lr=0.2, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for epoch in range(2):
            for x, y in recorder.batches(loader()):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if epoch == 0:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})
    return Traced(recorder.path, model, query())


@LOOPS.row("a layer frozen for one of two losses")
def frozen_for_one_loss(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            model[2].requires_grad_(False)
            model(x).square().mean().backward()
            model[2].requires_grad_(True)
            optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("a layer frozen midway")
def frozen_midway(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for epoch in range(2):
            model[0].requires_grad_(epoch == 0)
            for x, y in recorder.batches(loader()):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("a layer frozen midway, with gradients of zero")
def frozen_with_zeros(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, **options) as recorder:
        for epoch in range(2):
            model[0].requires_grad_(epoch == 0)
            for x, y in recorder.batches(loader()):
                optimizer.zero_grad(set_to_none=False)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("schedules of learning rate and weight decay")
def schedules(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    batches = loader()
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(2):
            for x, y in recorder.batches(batches):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step()
                optimizer.param_groups[0]["weight_decay"] *= 0.8
    return Traced(recorder.path, model, query())


@LOOPS.row("a one-cycle schedule, which moves the momentum too")
def one_cycle(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = loader()
    scheduler = OneCycleLR(optimizer, max_lr=0.3, total_steps=6)
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(2):
            for x, y in recorder.batches(batches):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step()
    return Traced(recorder.path, model, query())


@LOOPS.row("exponential moving average of the weights")
def moving_average(**options):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with explaind.trace(model, optimizer, **options) as recorder:
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            averaged.update_parameters(model)
    return Traced(recorder.path, model, query(), average=explaind.averages.ema(0.9))


@LOOPS.row("stochastic weight averaging")
def weight_averaging(**options):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    averaged = AveragedModel(model)
    batches = loader()
    with explaind.trace(model, optimizer, **options) as recorder:
        for epoch in range(2):
            for x, y in recorder.batches(batches):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if epoch == 1:
                    averaged.update_parameters(model)
    return Traced(recorder.path, model, query(), average=explaind.averages.swa(start=3))


# ---------------------------------------------------------------------- losses


def fit(loss, model=None, output=None, **options):
    """Three steps on a loss of the model's output and the batch's labels and places in the data."""
    model = model or mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 0]):
            optimizer.zero_grad()
            loss(model(FEATURES[rows]), LABELS[rows], rows).backward()
            optimizer.step()
    return Traced(recorder.path, model, explaind.Query(VALIDATION, output=output or explaind.outputs.log_prob([0, 2])))


@LOOPS.row("label smoothing")
def label_smoothing(**options):
    return fit(lambda out, y, _: F.cross_entropy(out, y, label_smoothing=0.2), **options)


@LOOPS.row("class weights")
def class_weights(**options):
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    return fit(lambda out, y, _: F.cross_entropy(out, y, weight=weights), **options)


@LOOPS.row("sample weights")
def sample_weights(**options):
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    return fit(
        lambda out, y, rows: (weights[rows] * F.cross_entropy(out, y, reduction="none")).sum() / weights[rows].sum(),
        **options,
    )


@LOOPS.row('`reduction="sum"`')
def summed_loss(**options):
    return fit(lambda out, y, _: 0.2 * F.cross_entropy(out, y, reduction="sum"), **options)


@LOOPS.row("a custom loss that couples the examples")
def contrastive_loss(**options):
    def loss(out, y, _):
        similarity = F.normalize(out, dim=1) @ F.normalize(out, dim=1).T
        return F.cross_entropy(similarity / 0.5, torch.arange(len(out)))

    return fit(loss, **options)


@LOOPS.row("a loss that leaves out some rows of the batch")
def hardest_examples(**options):
    return fit(lambda out, y, _: F.cross_entropy(out, y, reduction="none").topk(2).values.mean(), **options)


@LOOPS.row("a batch whose gradient is zero")
def zero_gradient(**options):
    return fit(lambda out, y, rows: F.cross_entropy(out, y) * (0.0 if rows[0] == 4 else 1.0), **options)


@LOOPS.row("regression")
def regression(**options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return fit(
        lambda out, y, _: F.mse_loss(out.squeeze(1), y.double()),
        model,
        explaind.outputs.value(),
        **options,
    )


class TwoHeads(nn.Module):
    """Classes and a value from one trunk, as a tuple or a dict."""

    def __init__(self, *, as_dict):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(3, 4).double()
        self.classes = nn.Linear(4, 3).double()
        self.value = nn.Linear(4, 1).double()
        self.as_dict = as_dict

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        classes, value = self.classes(hidden), self.value(hidden)
        return {"classes": classes, "value": value} if self.as_dict else (classes, value)


@LOOPS.row("several outputs in a tuple")
def tuple_outputs(**options):
    return fit(
        lambda out, y, _: F.cross_entropy(out[0], y) + F.mse_loss(out[1].squeeze(1), y.double()),
        TwoHeads(as_dict=False),
        explaind.outputs.log_prob([0, 2]).of("0"),
        **options,
    )


@LOOPS.row("outputs in a dict")
def dict_outputs(**options):
    return fit(
        lambda out, y, _: F.cross_entropy(out["classes"], y) + F.mse_loss(out["value"].squeeze(1), y.double()),
        TwoHeads(as_dict=True),
        explaind.outputs.log_prob([0, 2]).of("classes"),
        **options,
    )


@LOOPS.row("outputs in a dict, one of which the loss does not use")
def unused_output(**options):
    return fit(
        lambda out, y, _: F.cross_entropy(out["classes"], y),
        TwoHeads(as_dict=True),
        explaind.outputs.log_prob([0, 2]).of("classes"),
        **options,
    )
