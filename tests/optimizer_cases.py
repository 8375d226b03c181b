"""Every optimizer of torch.optim with every flag that changes its update."""

import torch
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop

import explaind
from tests.cases import NUM_CLASSES, NUM_FEATURES, Case, mlp, one_group, train


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
