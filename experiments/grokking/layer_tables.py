"""Through which layer groups a run was made, as tables by step and by phase."""

from __future__ import annotations

import pandas as pd

import explaind

from .phases import Phases

__all__ = ["layers_by_phase", "layers_by_step"]


def layers_by_step(data: explaind.Attribution) -> pd.DataFrame:
    """What the data and the decay did through each layer group in each step.

    Args:
        data: By query, step and layer.

    Returns:
        By `step` and `layer`, in nats:

        - `influence`: Σ over queries of |contribution|, the paper's layer influence. Examples are summed before the
          absolute value is taken, so what cancels between them within a step is gone;
        - `decay_influence`: likewise of |decay|; `influence` − `decay_influence` is the paper's balance D;
        - `contribution`, `decay`: mean over queries.
    """
    terms = data.dataset[["contribution", "decay"]]
    size, signed = abs(terms).sum("query"), terms.mean("query")
    table = {
        "influence": size.contribution,
        "decay_influence": size.decay,
        "contribution": signed.contribution,
        "decay": signed.decay,
    }
    return pd.DataFrame({name: term.to_series() for name, term in table.items()}).reset_index()


def layers_by_phase(steps: pd.DataFrame, phases: Phases) -> pd.DataFrame:
    """What was done through each layer group in each phase.

    Args:
        steps: From :func:`layers_by_step`.
        phases: Of the run.

    Returns:
        By `phase` and `layer`, with the `start` and `stop` of its steps: the columns of `steps` summed over them;
        `share`, the layer's part of the phase's influence, in which large steps count for more; and `mean_share`, the
        mean over steps of its part of the step's influence, in which a spike of the loss counts as any other step.
    """
    total = steps.groupby("step")["influence"].transform("sum")
    steps = steps.assign(mean_share=steps["influence"] / total)
    frames = []
    for name, span in phases.spans.items():
        groups = steps[steps["step"].between(span.start, span.stop - 1)].groupby("layer", sort=False)
        table = groups[["influence", "decay_influence", "contribution", "decay"]].sum().reset_index()
        table["share"] = table["influence"] / table["influence"].sum()
        table["mean_share"] = groups["mean_share"].mean().to_numpy()
        frames.append(table.assign(phase=name, start=span.start, stop=span.stop))
    return pd.concat(frames, ignore_index=True)
