"""What the paper says of the grokking run, and what ours shows: each verdict is computed from the results.

A claim agrees or disagrees by the rule in its function. What the paper only shows, or leaves open, is refined by the
numbers of this run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from explaind.analysis.influence import smooth

from .frequencies import weight_on
from .model import PIPELINE
from .perturbations import correlations
from .results import Results
from .retraining import first_epochs

__all__ = ["CLAIMS", "Claim", "judge"]

Verdict = Literal["agrees", "refines", "disagrees"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement, and what came of checking it."""

    theirs: str
    """What the paper says or shows."""
    ours: str
    """What this run shows, with its numbers."""
    verdict: Verdict
    figure: str
    """Name of the picture."""


def judge(results: Results) -> list[Claim]:
    """Check every claim on one study."""
    return [check(results) for check in CLAIMS]


def _delay(r: Results) -> Claim:
    """Much later is half of the validation pairs at 1.5 times the step of memorising, or more."""
    phases = r.study.phases
    late = phases.half_generalised / max(phases.memorised, 1)
    return Claim(
        theirs="The network memorises first and generalises much later.",
        ours=f"Training accuracy reached 0.99 at step {phases.memorised}, with validation accuracy "
        f"{r.study.curves['validation_accuracy'].iloc[phases.memorised]:.2f}; validation accuracy reached 0.5 at step "
        f"{phases.half_generalised} ({late:.1f} times as late) and 0.95 at step {phases.generalised}.",
        verdict="agrees" if late >= 1.5 else "disagrees",
        figure="training_curves",
    )


def _memorisation(r: Results) -> Claim:
    """Carried by them is more than in later phases and more than half; more than later only refines it."""
    shares = phase_shares(r)
    late = shares.sel(layer=["linear2", "decoder"]).sum("layer")
    first, rest = float(late[0]), float(late[1:].max())
    return Claim(
        theirs="Memorisation is carried by the decoder and the last layers.",
        ours=f"While memorising, {first:.0%} of the layer influence is in linear2 and the decoder, later at most "
        f"{rest:.0%} of it; the decoder alone has {_by_phase(shares.sel(layer='decoder'))}.",
        verdict="agrees" if first > rest and first > 0.5 else "refines" if first > rest else "disagrees",
        figure="layer_influence",
    )


def _pipeline(r: Results) -> Claim:
    """They alternate if the leading one of them changes more often, per step, than in the other phases."""
    leading = smooth(r.layer_influence.sel(layer=list(PIPELINE))).argmax("layer")
    changes = (leading.diff("step") != 0).astype(float)
    spans = r.study.phases.spans
    often = {name: 100 * float(changes.sel(step=slice(p.start, p.stop - 1)).mean()) for name, p in spans.items()}
    middle = phase_shares(r).sel(layer=list(PIPELINE)).sum("layer")
    forming = often.pop("circuit formation", 0.0)
    return Claim(
        theirs="While the circuit forms, the intermediate layers alternate.",
        ours="The leading one of attention encoders, attention decoders and linear1 changes "
        f"{forming:.1f} times in 100 steps while the circuit forms, "
        + ", ".join(f"{value:.1f} in {name}" for name, value in often.items())
        + f". Together they have {_by_phase(middle)} of the layer influence.",
        verdict="agrees" if forming > max(often.values(), default=0.0) else "disagrees",
        figure="layer_influence",
    )


def _decay(r: Results) -> Claim:
    """It grows if, relative to the data, it is largest in the last phase."""
    ratio = in_phases(r, r.model_influence["decay"]) / in_phases(r, r.model_influence["data"])
    return Claim(
        theirs="In the last phase the part of weight decay grows.",
        ours=f"Decay moved the predictions {_by_phase(ratio, '{:.2f}')} times as much as the data.",
        verdict="agrees" if float(ratio[-1]) > float(ratio[:-1].max()) else "disagrees",
        figure="model_influence",
    )


def _balance(r: Results) -> Claim:
    together = r.balance.sum("layer")
    ahead = together["first_step"].values[together.values > 0].tolist()
    return Claim(
        theirs="D = |data part| − |decay part| shows which of them dominates, in windows of 50 steps.",
        ours=f"Summed over layer groups the data dominates in {len(ahead)} of {r.balance.sizes['window']} windows, "
        f"which begin at {', '.join(map(str, ahead)) or 'no step'}; of all windows and layer groups decay dominates in "
        f"{float((r.balance < 0).mean()):.0%}.",
        verdict="refines",
        figure="balance",
    )


def _alignment(r: Results) -> Claim:
    """At once is 99 % on validation in four of five seeds; no earlier outer layers, nor none, may lead to 90 %."""
    epochs = first_epochs(r.retrained_parts)
    outer = epochs[epochs["condition"] == "grokked outer layers"]
    ends = {str(name): float(part["last_accuracy"].mean()) for name, part in epochs.groupby("condition", sort=False)}
    reached = outer["epoch"].dropna()
    when = f", after {reached.min():.0f}–{reached.max():.0f} epochs" if len(reached) else ""
    given = ends.pop("grokked outer layers")
    rest = "; ".join(f"{name}: {accuracy:.0%} in the end" for name, accuracy in ends.items())
    controls = [accuracy for name, accuracy in ends.items() if name != "grokked pipeline"]
    most = len(reached) >= 0.8 * len(outer)
    return Claim(
        theirs="In the last phase the outer layers align around the pipeline that was learned before: copied into a "
        "fresh network, they let it generalise at once.",
        ours=f"Given the outer layers, {len(reached)} of {len(outer)} seeds reach 99 % on validation{when}. {rest}.",
        verdict="agrees" if most and max(controls) < 0.9 else "refines" if given > ends["nothing"] else "disagrees",
        figure="retraining",
    )


def _frequencies(r: Results) -> Claim:
    """They appear if the key frequencies have twice the weight that they had by chance; less refines it."""
    key, fit = r.key_frequencies, r.frequency_fit
    weight, chance = weight_on(fit, key), len(key) / len(fit)
    return Claim(
        theirs="The cyclic geometry of the residues appears in the scores.",
        ours=f"The network's key frequencies are {', '.join(map(str, key))}; of the weight that the fit to the linear2 "
        f"similarities gives to frequencies, {weight:.0%} lies on these, {chance:.0%} would by chance.",
        verdict="agrees" if weight > 2 * chance else "refines" if weight > chance else "disagrees",
        figure="frequency_fit",
    )


def _machine(r: Results) -> Claim:
    """As the network does is the same argmax everywhere and a KL below a thousandth of a nat."""
    (fit,) = r.kernel_machine.to_dict("records")
    return Claim(
        theirs="The kernel machine predicts as the network does: argmax agreement 1.0, KL 0.0, by 100 nodes per step.",
        ours=f"On {fit['num_inputs']:.0f} pairs and all their outputs the argmax agrees on "
        f"{fit['argmax_agreement']:.0%}, KL {fit['kl']:.0e} nats, error {fit['mean_error']:.0e} nats on average and "
        f"{fit['max_error']:.0e} at most.",
        verdict="agrees" if fit["argmax_agreement"] == 1 and fit["kl"] < 1e-3 else "disagrees",
        figure="certificate",
    )


def _nodes(r: Results) -> Claim:
    adaptive = r.nodes[r.nodes["family"].str.startswith("adaptive")]
    midpoint = r.nodes[r.nodes["family"] == "midpoint"]
    best = midpoint.sort_values("mean_error").iloc[0]
    enough = adaptive[adaptive["mean_error"] <= best["mean_error"]]
    found = enough["nodes"].min() if len(enough) else np.nan
    return Claim(
        theirs="100 nodes per step are used; how many are enough is left open.",
        ours=f"Midpoint leaves {best['mean_error']:.0e} nats with {best['nodes']:.0f} nodes per step; with averaged "
        f"kinks and as many nodes as a step needs, {found:.1f} on average leave less. The rule: divide a step until "
        "its own measured error is within its part of the tolerance.",
        verdict="refines",
        figure="nodes",
    )


def _pruning(r: Results) -> Claim:
    means = r.pruned.groupby(["criterion", "fraction"])["accuracy"].mean().unstack("criterion")
    inner = means[(means.index > 0) & (means.index < 1)]
    area = {name: float(inner[name].mean()) for name in ("influence", "magnitude", "random")}
    return Claim(
        theirs="The network is pruned by influence, with magnitude and chance as baselines.",
        ours=f"Validation accuracy, mean over the fractions kept: by influence {area['influence']:.2f}, by magnitude "
        f"{area['magnitude']:.2f}, at random {area['random']:.2f}.",
        verdict="refines",
        figure="pruning",
    )


def _cancellation(r: Results) -> Claim:
    ratios = r.cancellation.set_index("over")["mean"]
    return Claim(
        theirs="How far single contributions cancel is not told.",
        ours=f"Of the absolute contributions of single examples {ratios['examples']:.2%} is left in their sum, "
        f"of those of examples, windows and layers {ratios['examples, windows and layers']:.2%}.",
        verdict="refines",
        figure="top_examples",
    )


def _perturbations(r: Results) -> Claim:
    found = correlations(r.perturbed)
    every = found[found["chosen"] == "all"].to_dict("records")
    texts = [
        f"{'examples, last' if row['kind'] == 'example' else 'parameter elements, all'} {row['num_steps']} steps: "
        f"Pearson {row['pearson']:.2f}, Spearman {row['spearman']:.2f} ({row['num']} points)"
        for row in every
    ]
    (replayed,) = r.replayed.to_dict("records")
    return Claim(
        theirs="Whether high scores matter for predictions was asked by reviewers and not answered.",
        ours=f"Score against what changes without it: {'; '.join(texts)}. With nothing removed, the last "
        f"{replayed['num_steps']} steps made again end {replayed['difference']:.0e} from the recorded weights.",
        verdict="refines",
        figure="perturbations",
    )


def _phases(r: Results) -> Claim:
    found = r.change_points[["step", "low", "high"]].astype(int).to_numpy().tolist()
    points = [f"{step} ({low}–{high})" for step, low, high in found]
    phases = r.study.phases
    boundaries = (phases.memorised, phases.half_generalised, phases.generalised)
    met = sum(any(low <= boundary <= high for _, low, high in found) for boundary in boundaries)
    return Claim(
        theirs="Phases are read off the curves by eye.",
        ours=f"The layer shares change at {', '.join(points) or 'no step'} (with 95 % intervals); {met} of the "
        f"{len(boundaries)} steps at which accuracies were reached ({', '.join(map(str, boundaries))}) lie in one of "
        "the intervals.",
        verdict="refines",
        figure="change_points",
    )


CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    _delay,
    _memorisation,
    _pipeline,
    _decay,
    _balance,
    _alignment,
    _frequencies,
    _machine,
    _nodes,
    _pruning,
    _cancellation,
    _perturbations,
    _phases,
)
"""In the order of the story."""


def in_phases(r: Results, term: xr.DataArray) -> xr.DataArray:
    """A term of every step, summed over each phase, `[phase, …]`."""
    spans = r.study.phases.spans
    parts = [term.sel(step=slice(span.start, span.stop - 1)).sum("step") for span in spans.values()]
    return xr.concat(parts, "phase").assign_coords(phase=list(spans))


def phase_shares(r: Results) -> xr.DataArray:
    """Each layer's part of the layer influence in every phase, `[phase, layer]`."""
    influence = in_phases(r, r.layer_influence)
    return influence / influence.sum("layer")


def _by_phase(values: xr.DataArray, number: str = "{:.0%}") -> str:
    return ", ".join(
        f"{number.format(float(value))} in {phase}"
        for phase, value in zip(values["phase"].values.tolist(), values, strict=True)
    )
