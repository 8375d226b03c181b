"""The findings, as JSON and in words: every number is written by the code that computed it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from explaind import Attribution

from .claims import in_phases, judge, phase_shares
from .measures import same_class_share
from .results import Results

__all__ = ["collect", "write"]


def collect(results: Results) -> dict[str, Any]:
    """All numbers of the study, JSON-able."""
    study, phases = results.study, results.study.phases
    shares, influence = phase_shares(results), in_phases(results, results.model_influence.to_dataarray("part"))
    kernels = results.phase_kernels
    per_phase = {
        name: {
            "steps": [span.start, span.stop],
            "layer_share": {str(layer): float(shares.sel(phase=name, layer=layer)) for layer in shares["layer"].values},
            "decay_to_data": float(influence.sel(phase=name, part="decay") / influence.sel(phase=name, part="data")),
            "same_class_share": same_class_share(kernels.sel(phase=name)),
        }
        for name, span in phases.spans.items()
    }
    return {
        "recipe": str(study.recipe),
        "sizes": asdict(results.sizes),
        "num_parameters": study.run.table.num_elements,
        "num_steps": study.run.num_steps,
        "num_train": study.recipe.num_train,
        "num_validation": len(study.split.validation_labels),
        "accuracy": {name: float(study.curves[f"{name}_accuracy"].iloc[-1]) for name in ("train", "validation")},
        "memorised_at": phases.memorised,
        "half_generalised_at": phases.half_generalised,
        "generalised_at": phases.generalised,
        "phases": per_phase,
        "num_classes": int(kernels.sizes["group"]),
        "closure": {
            name: closure_numbers(result)
            for name, result in (
                ("by class", results.by_class),
                ("by example", results.by_example),
                ("by element", results.by_element),
            )
        },
        "kernel_machine": results.kernel_machine.to_dict("records")[0],
        "claims": [asdict(claim) for claim in judge(results)],
        "seconds": study.seconds,
    }


def closure_numbers(result: Attribution) -> dict[str, float]:
    """The certificate of one decomposition, in nats and relative."""
    data, closure = result.dataset, result.closure
    change = float(np.abs(data.prediction - data.initial).mean())
    total_error = np.abs(data.quadrature.sum("update_step"))
    return {
        "num_queries": int(data.sizes["query"]),
        "relative_closure_error": closure.error,
        "max_closure_error": float(np.abs(result.total - data.prediction).max()),
        "mean_total_quadrature_error": float(total_error.mean()),
        "max_total_quadrature_error": float(total_error.max()),
        "mean_summed_step_residuals": float(np.abs(data.quadrature).sum("update_step").mean()),
        "mean_change": change,
        "quadrature_error_over_change": float(total_error.mean()) / change,
        "mean_path_length": float(data.path_length.mean()),
        "mean_nodes_per_step": float(data.num_nodes.mean()),
        "other_over_path": closure.other,
        "rounding_over_path": closure.rounding,
    }


def write(findings: dict[str, Any], directory: Path) -> None:
    """Write `findings.json` and `findings.md`."""
    (directory / "findings.json").write_text(json.dumps(findings, indent=1, ensure_ascii=False) + "\n")
    (directory / "findings.md").write_text(in_words(findings))


def in_words(found: dict[str, Any]) -> str:
    """The findings as a page."""
    memorised, half, done = (found[f"{name}_at"] for name in ("memorised", "half_generalised", "generalised"))
    layers = list(next(iter(found["phases"].values()))["layer_share"])
    lines = [
        "# Findings",
        "",
        f"`{found['recipe']}`: {found['num_parameters']:,} parameters, {found['num_train']:,} training pairs, "
        f"{found['num_steps']:,} steps of AdamW on the full batch. Every number on this page was written by the run "
        "that it describes, and is in `findings.json`.",
        "",
        "## What the paper says, and what this run shows",
        "",
        "| the paper | this run | | figure |",
        "|---|---|---|---|",
        *(
            f"| {_in_a_cell(claim['theirs'])} | {_in_a_cell(claim['ours'])} | **{claim['verdict']}** "
            f"| [{claim['figure']}](figures/{claim['figure']}.png) |"
            for claim in found["claims"]
        ),
        "",
        "Verdicts on one run are of that run; what holds over seeds and tasks is in the table that "
        "`python -m experiments.grokking.across` writes.",
        "",
        "## The sums add up",
        "",
        "| decomposition | queries | mean change (nats) | sum of all terms − prediction (nats) | total quadrature "
        "error / mean change | nodes per step | rounding / path | other / path |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {c['num_queries']} | {c['mean_change']:.2f} | {c['max_closure_error']:.1e} | "
            f"{c['quadrature_error_over_change']:.1e} | {c['mean_nodes_per_step']:.1f} | "
            f"{c['rounding_over_path']:.1e} | {c['other_over_path']:.1e} |"
            for name, c in found["closure"].items()
        ),
        "",
        "## What happened in each phase",
        "",
        f"Training accuracy reached 0.99 at step {memorised}, validation accuracy 0.5 at step {half} and 0.95 at step "
        f"{done}. At the end: training {found['accuracy']['train']:.3f}, validation "
        f"{found['accuracy']['validation']:.3f}.",
        "",
        "| phase | steps | " + " | ".join(layers) + " | decay / data | kernel between equal classes |",
        "|---|---|" + "---|" * (len(layers) + 2),
        *(
            f"| {name} | {p['steps'][0]}–{p['steps'][1] - 1} | "
            + " | ".join(f"{share:.1%}" for share in p["layer_share"].values())
            + f" | {p['decay_to_data']:.2f} | {p['same_class_share']:.1%} |"
            for name, p in found["phases"].items()
        ),
        "",
        "Layer columns are shares of the layer influence, Σ |contribution| over classes. Were classes of no "
        f"importance, {1 / found['num_classes']:.1%} of the absolute kernel would lie between equal classes.",
        "",
        "These numbers are additive: they say how the predictions came about in this run, step by step. They do not "
        "say what they would be had an example not been there; `perturbations` and `retraining` ask that.",
        "",
        "## Time",
        "",
        ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["seconds"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _in_a_cell(text: str) -> str:
    """Text of a Markdown table, in which a bar would end the cell."""
    return text.replace("|", "\\|")
