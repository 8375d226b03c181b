"""The study from beginning to end: what is computed, in order, and what each picture shows of it."""

from __future__ import annotations

from .decompose import by_class, by_element, by_example, kernel_machine
from .sizes import Sizes
from .study import Study

__all__ = ["carry_out"]


def carry_out(study: Study, sizes: Sizes) -> None:
    """Compute what is missing of a study, draw its pictures and write its findings."""
    recipe, run, phases, progress = study.recipe, study.run, study.phases, study.progress
    study.attribution("by_class", lambda out: by_class(run, recipe, sizes, out, progress=progress))
    study.attribution("by_example", lambda out: by_example(run, recipe, sizes, phases, out, progress=progress))
    study.attribution("by_element", lambda out: by_element(run, recipe, sizes, out, progress=progress))
    study.table("kernel_machine", lambda: kernel_machine(run, recipe, sizes))
