"""Loops that do something to the gradients, or to the weights themselves, and losses that add to them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from explaind.errors import RecordingError
from tests.cases import one_group
from tests.loops.problem import ADAMW, MOMENTUM, SLOW_MOMENTUM, VALIDATION, loader, single, step, traced
from tests.loops.row import Rows

GRADIENTS = Rows()

# ---------------------------------------------------------------------- clipping and scaling


def edited(optimizer):
    """Decorate `edit(model)`, which a loop then calls between backward and step."""

    def decorate(edit):
        @traced(optimizer)
        def loop(model, optimizer, recorder):
            for x, y in recorder.batches(loader()):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                edit(model)
                optimizer.step()

        return loop

    return decorate


@GRADIENTS.row("`clip_grad_norm_`")
@edited(ADAMW)
def clipped_by_norm(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@GRADIENTS.row("`clip_grad_norm_` of one layer")
@edited(MOMENTUM)
def clipped_layer(model):
    nn.utils.clip_grad_norm_(model[0].parameters(), 0.05)


@GRADIENTS.row("`clip_grad_value_`")
@edited(MOMENTUM)
def clipped_by_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.1)


@GRADIENTS.row("`GradScaler` with an overflow, unscaling and clipping")
@traced(MOMENTUM)
def grad_scaler(model, optimizer, recorder):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, (x, y) in enumerate(recorder.batches(loader())):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (float("inf") if number == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


@GRADIENTS.row("`GradScaler` without unscaling by hand, fused optimizer", dtype=torch.float32)
@traced(one_group(SGD, lr=0.2, momentum=0.9, fused=True), make=single, inputs=VALIDATION.float())
def fused_grad_scaler(model, optimizer, recorder):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
        scaler.step(optimizer)
        scaler.update()


@GRADIENTS.row("autocast to bfloat16", dtype=torch.bfloat16)
@traced(MOMENTUM, make=single, inputs=VALIDATION.float())
def autocast(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------------- by hand


@GRADIENTS.row("gradients written by hand")
@traced(SLOW_MOMENTUM)
def gradients_by_hand(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def with_hooks(model):
    for parameter in model[0].parameters():
        parameter.register_hook(lambda gradient: 0.5 * gradient)
    return SLOW_MOMENTUM(model)


@GRADIENTS.row("gradients scaled by a hook")
@traced(with_hooks)
def hooked_gradients(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        step(model, optimizer, x, y)


@GRADIENTS.row("gradients centralised by hand", foreign=True)
@edited(SLOW_MOMENTUM)
def centralised_gradients(model):
    for weight in (model[0].weight, model[2].weight):
        weight.grad -= weight.grad.mean(dim=1, keepdim=True)


@GRADIENTS.row("sharpness-aware minimisation", refused=RecordingError)
@traced(SLOW_MOMENTUM)
def sharpness_aware(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        F.cross_entropy(model(x), y).backward()
        ascent = [0.05 * parameter.grad for parameter in model.parameters()]
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, distance in zip(model.parameters(), ascent, strict=True):
                    parameter += sign * distance
            if sign == 1:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@GRADIENTS.row("injected gradient noise", foreign=True)
@edited(SLOW_MOMENTUM)
def gradient_noise(model):
    for parameter in model.parameters():
        parameter.grad += 0.01 * torch.randn_like(parameter)


# ---------------------------------------------------------------------- penalties and projections


@GRADIENTS.row("a penalty on the parameters in the loss", foreign=True)
@traced(ADAMW)
def penalty(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        norm = sum(parameter.abs().sum() for parameter in model.parameters())
        (F.cross_entropy(model(x), y) + 0.01 * norm).backward()
        optimizer.step()


@GRADIENTS.row("weights clamped after the step", foreign=True)
@traced(MOMENTUM)
def clamped_weights(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        step(model, optimizer, x, y)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.5, 0.5)


@GRADIENTS.row("a gradient penalty, by double backward", foreign=True)
@traced(MOMENTUM)
def gradient_penalty(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        output = model(x.requires_grad_())
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (F.cross_entropy(output, y) + 0.1 * slope.square().sum()).backward()
        optimizer.step()
