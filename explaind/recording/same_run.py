"""Whether a recording that is resumed has the optimizers, the device and the options of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from explaind.errors import ResumeError
from explaind.parameters import ParameterTable
from explaind.places import Place
from explaind.recording.host import machine

__all__ = ["check_same_run", "place_of_computation"]

_OPTIONS = ("snapshot_every", "example_grads")
_ADVICE = "Build the optimizer as it was when the recording began; it is brought to where it was from there."


def check_same_run(
    recorded: Mapping[str, Any], given: Mapping[str, Any], table: ParameterTable, owners: Mapping[str, int], path: Place
) -> None:
    """What is to be recorded must be what is in a run.

    Args:
        recorded: attributes of the run.
        given: what they would be if it began now.
        table: its parameters.
        owners: number of the group that each parameter is in now, by name.
        path: where the run is.

    Raises:
        ResumeError: it is not.
    """
    _check_options(recorded, given, path)
    _check_optimizers(recorded, given, table, owners, path)
    _check_device(recorded["device"], given["device"], path)


def _check_options(recorded: Mapping[str, Any], given: Mapping[str, Any], path: Place) -> None:
    for name in _OPTIONS:
        if recorded[name] != given[name]:
            raise ResumeError(
                f"{path} was recorded with {name}={recorded[name]!r}, and is to be resumed with {given[name]!r}. Give "
                "the same, or record to another path."
            )


def _check_device(recorded: str, given: str, path: Place) -> None:
    if torch.device(recorded).type != torch.device(given).type:
        raise ResumeError(
            f"{path} was recorded on {recorded} and the model is on {given}, which draw other random numbers. Move the "
            f"model to a {torch.device(recorded).type} device, or record to another path."
        )


def _check_optimizers(
    recorded: Mapping[str, Any],
    given: Mapping[str, Any],
    table: ParameterTable,
    owners: Mapping[str, int],
    path: Place,
) -> None:
    before, now = recorded["groups"], given["groups"]
    if len(before) != len(now):
        hint = " Groups that were added while it was recorded have to be added before explaind.trace."
        raise ResumeError(
            f"the optimizer has {len(now)} parameter groups, in the run at {path} it has {len(before)}."
            f"{hint if len(before) > len(now) else ''} {_ADVICE}"
        )
    for number, (old, new) in enumerate(zip(recorded["group_optimizers"], given["group_optimizers"], strict=True)):
        if old != new:
            raise ResumeError(
                f"the optimizer of parameter group {number} is {new}, in the run at {path} it is {old}. {_ADVICE}"
            )
    for parameter in table:
        owner = owners.get(parameter.name)
        if owner != parameter.group:
            found = "no group of the optimizer" if owner is None else f"group {owner} of the optimizer"
            raise ResumeError(
                f"the parameter '{parameter.name}' is in {found}, in the run at {path} it is in group "
                f"{parameter.group}. {_ADVICE}"
            )
    if extra := sorted(owners.keys() - set(table.names)):
        raise ResumeError(f"the optimizer has the parameter '{extra[0]}', in the run at {path} it does not. {_ADVICE}")
    for number, (constants, settings) in enumerate(zip(before, now, strict=True)):
        _check_settings(number, constants, settings, path)


def _check_settings(group: int, before: Mapping[str, Any], now: Mapping[str, Any], path: Place) -> None:
    for key, value in before.items():
        has_address = isinstance(value, str) and " at 0x" in value
        if key not in now or (now[key] != value and not has_address):
            found = repr(now[key]) if key in now else "missing"
            raise ResumeError(
                f"the optimizer's setting '{key}' of parameter group {group} is {found}, in the run at {path} it was "
                f"{value!r} when the recording began. {_ADVICE}"
            )


def place_of_computation(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What to note of a run that goes on elsewhere, where sums are rounded otherwise; nothing if it does not."""
    versions = recorded["versions"]
    here = {"machine": machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    there = {"machine": recorded["machine"], "torch": versions["torch"], "threads": recorded["threads"]}
    if here == there:
        return {}
    # A reader that finds another machine than its own takes no difference in rounding for an error.
    text = f"{here['machine']}, torch {here['torch']}, {here['threads']} threads"
    known = str(recorded["machine"])
    return {} if known.endswith(text) else {"machine": f"{known}; then {text}"}
