"""The command line: `explaind info`, `explaind verify`, `explaind export`."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from explaind.errors import DamagedStoreError, ExplaindError, VerificationError
from explaind.places import Place, place_of

if TYPE_CHECKING:  # torch takes seconds to import, and only some commands need it
    from explaind.run import Run

__all__ = ["main"]


class _CannotBeDone(click.ClickException):
    """What was asked is not possible; an exception of click itself has exit code 1."""

    exit_code = 2


class _Commands(click.Group):
    """Commands whose errors are messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DamagedStoreError, VerificationError) as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:  # nobody reads on, which click takes quietly
            raise
        except (ExplaindError, OSError) as error:
            raise _CannotBeDone(str(error)) from error


def _imported(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """A function of a Python module, given as `package.module:name`."""
    if value is None:
        return None
    found = _named(ctx, param, value)
    if not callable(found):
        raise click.BadParameter(f"{value!r}: the module has a {type(found).__name__} there, no function.", ctx, param)
    return found


def _imported_data(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Where inputs are, by the same kind of name; what makes it is called."""
    if value is None:
        return None
    found = _named(ctx, param, value)
    makes = isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__"))
    return found() if makes and _needs_nothing(found) else found


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # of what is not written in Python
        return False
    return True


def _named(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    module_name, colon, name = value.partition(":")
    if not (module_name and colon and name):
        raise click.BadParameter(f"{value!r} is not of the form package.module:name.", ctx, param)
    if str(Path.cwd()) not in sys.path:  # as `python -m` has it
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        raise click.BadParameter(f"{value!r}: {error}; it is looked for in {Path.cwd()}, too.", ctx, param) from error
    if found is None:
        raise click.BadParameter(f"{value!r}: the module has nothing of that name.", ctx, param)
    return found


def _stretch(ctx: click.Context, param: click.Parameter, value: str | None) -> slice | None:
    """Successive steps, given as Python's `first:stop`."""
    if value is None:
        return None
    try:
        first, stop = (int(part) if part else None for part in value.split(":"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not of the form first:stop, such as 100:200.", ctx, param) from None
    return slice(first, stop)


class _Store(click.Path):
    """A directory, or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in value:
            return super().convert(value, param, ctx)
        try:
            return place_of(value)
        except (ImportError, ValueError) as error:
            self.fail(str(error), param, ctx)


_run = click.argument("run", type=_Store(exists=True, file_okay=False, path_type=Path))
_model = click.option(
    "--model",
    callback=_imported,
    metavar="MODULE:NAME",
    help="Function that makes the recorded model, such as package.module:make_model.",
)
_objective = click.option(
    "--objective",
    callback=_imported,
    metavar="MODULE:NAME",
    help="The function that explaind.trace was given as objective, if it was.",
)
_data = click.option(
    "--data",
    callback=_imported_data,
    metavar="MODULE:NAME",
    help="Where the inputs are, if the run was recorded with inputs='by_reference': a map-style data set, a DataLoader "
    "of it, a function that takes a list of ids to the inputs, or one without arguments that makes any of these.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="explaind-tracer", prog_name="explaind")
def main() -> None:
    """Look at recorded training runs.

    Exit codes: 0, all is well; 1, a run is damaged or does not replay; 2, what was asked cannot be done.
    """


@main.command()
@_run
@_json
def info(run: Place, as_json: bool) -> None:
    """Show what RUN, a directory or a URL, holds, and where its bytes are.

    It may still be recorded, and need not be whole; nothing is changed. Sizes are those on the disk and, as "plain",
    those of the numbers before they were compressed. "× 4·D" is the size of a step in units of one float32 number for
    each of the model's D parameters.
    """
    from explaind.inventory import store_info

    found = store_info(run)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))


@main.command()
@_run
@_model
@_objective
@_data
@_json
def verify(
    run: Place, model: Callable[..., Any] | None, objective: Callable[..., Any] | None, data: Any, as_json: bool
) -> None:
    """Check every chunk of every array of RUN against its checksum.

    All damage is listed, and then the exit code is 1. With --model every step is replayed, too: the gradient from its
    batch, the update through the real optimizer. An update that does not lead to the recorded parameters also is exit
    code 1.
    """
    from explaind.damage import find_damage
    from explaind.store import StoreReader

    store = StoreReader(run)
    damage = list(find_damage(store, progress=True))
    report, failure = None, None
    if damage:
        lost = "1 piece is" if len(damage) == 1 else f"{len(damage):,} pieces are"
        skipped = ", so no step was replayed" if model is not None else ""
        failure = click.ClickException(f"{run}: {lost} damaged{skipped}.")
    else:
        opened = _opened(run, model, objective, data)
        if model is not None:
            _check_data(opened, data, "replaying it")
        try:
            report = opened.verify(progress=True) if model is not None else None
        except VerificationError as error:
            failure = click.ClickException(str(error))
    if as_json:
        result = {
            "path": str(run),
            "num_steps": store.commit.num_steps,
            "num_arrays": len(store.commit.arrays),
            "damage": [asdict(entry) for entry in damage],
            "replay": None if report is None else asdict(report) | {"bit_exact": report.bit_exact},
            "error": None if failure is None else str(failure),
        }
        click.echo(json.dumps(result, indent=2))
    else:
        for entry in damage:
            click.echo(entry)
        if not damage:
            click.echo(f"{store.commit.num_steps:,} steps in {len(store.commit.arrays)} arrays, nothing is damaged")
        if report is not None:
            click.echo(report)
    if failure is not None:
        raise failure


@main.command()
@_run
@click.argument("out", type=_Store(path_type=Path))
@click.option(
    "--steps",
    callback=_stretch,
    metavar="FIRST:STOP",
    help="The steps from FIRST to before STOP, as in Python; by default all.",
)
@click.option(
    "--every",
    type=click.IntRange(min=2),
    metavar="K",
    help="Store only the parameters before every K-th step; the steps between are replayed when they are read. This "
    "takes --model, and as long as verifying.",
)
@_model
@_objective
@_data
def export(
    run: Place,
    out: Place,
    steps: slice | None,
    every: int | None,
    model: Callable[..., Any] | None,
    objective: Callable[..., Any] | None,
    data: Any,
) -> None:
    """Write some of the steps of RUN to a run of their own, the new directory or URL OUT."""
    from explaind.run import open_run, successive_steps

    if every is not None and model is None:
        raise click.UsageError("--every replays the steps, which takes --model module:name.")
    opened = _opened(run, model, objective, data)
    if every is not None:
        _check_data(opened, data, "--every")
    try:
        chosen = successive_steps(steps, opened.num_steps)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--steps") from error
    try:
        opened.export(out, steps=chosen, every=every, progress=True)
    except ExplaindError:
        raise
    except ValueError as error:
        if model is not None:
            raise
        message = "the first or the last of these steps has to be replayed, which takes --model module:name."
        raise click.UsageError(message) from error
    click.echo(f"{open_run(out).num_steps:,} steps are in {out}")


def _opened(run: Place, model: Callable[..., Any] | None, objective: Callable[..., Any] | None, data: Any) -> Run:
    from torch import nn

    from explaind.run import open_run

    made = model if model is None or isinstance(model, nn.Module) else model()
    if not (made is None or isinstance(made, nn.Module)):
        raise click.UsageError(f"--model must name a torch.nn.Module or what makes one; it made {made!r}.")
    try:
        opened = open_run(run, made, objective=objective, data=data)
    except TypeError as error:
        if data is None:
            raise
        raise click.BadParameter(str(error), param_hint="--data") from error
    if made is not None and opened.uses_objective and objective is None:
        raise click.UsageError(
            "the run was recorded with an objective: name the function with --objective module:name."
        )
    return opened


def _check_data(opened: Run, data: Any, what: str) -> None:
    """What replays the steps of a run whose inputs are in a data set needs that."""
    if opened.refers_to_data and data is None:
        raise click.UsageError(f"the run has its inputs by reference: {what} takes the data set, --data module:name.")
