"""All results of the study: each is computed when it is first asked for, from those that it needs, and then kept."""

from __future__ import annotations

from functools import cached_property, partial

import pandas as pd
import xarray as xr

from explaind import Attribution
from explaind.analysis import change_points as segments
from explaind.analysis.influence import layer_influence, layer_shares, model_influence
from explaind.analysis.scores import absolute_importance, cancellation_ratio, data_decay_balance
from explaind.analysis.similarity import similarity, window_similarity

from . import decompose, frequencies, kernels, measures, scores
from .nodes import closure_by_nodes
from .perturbations import element_scores, perturb_elements, perturb_examples
from .progress import progress_over_steps
from .pruning import prune_curves
from .removal import replay_difference
from .retraining import conditions, retrain
from .study import Study
from .swaps import swap_curves

__all__ = ["Results"]


class Results:
    """What the study finds out, by name; what is small is computed from the kept results each time."""

    def __init__(self, study: Study) -> None:
        self.study, self.sizes = study, study.sizes

    # ---------------------------------------------------------------- decompositions

    @cached_property
    def by_class(self) -> Attribution:
        """Class means by training class, step and layer."""
        s = self.study
        return s.attribution(
            "by_class", lambda out: decompose.by_class(s.run, s.recipe, self.sizes, out, progress=s.progress)
        )

    @cached_property
    def by_example(self) -> Attribution:
        """Single predictions by training example, window and layer."""
        s = self.study
        return s.attribution(
            "by_example",
            lambda out: decompose.by_example(s.run, s.recipe, self.sizes, s.phases, out, progress=s.progress),
        )

    @cached_property
    def by_element(self) -> Attribution:
        """Single predictions by window and parameter element."""
        s = self.study
        return s.attribution(
            "by_element", lambda out: decompose.by_element(s.run, s.recipe, self.sizes, out, progress=s.progress)
        )

    @cached_property
    def kernel_machine(self) -> pd.DataFrame:
        """How far the kernel machine is from the network."""
        s = self.study
        return s.table("kernel_machine", lambda: decompose.kernel_machine(s.run, s.recipe, self.sizes))

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """Closure error against nodes, on steps of every phase."""
        s = self.study
        query = scores.validation_pairs(s.recipe, num=self.sizes.node_queries)
        steps = sorted({step for span in s.phases.spans.values() for step in spread(span, self.sizes.node_steps)})
        return s.table("nodes", lambda: closure_by_nodes(s.run, query, steps=steps, progress=s.progress))

    # ---------------------------------------------------------------- summaries of them

    @cached_property
    def model_influence(self) -> xr.Dataset:
        """By step, of the data and the decay."""
        return self.study.dataset("model_influence", lambda: model_influence(self.by_class.dataset)).load()

    @cached_property
    def running_totals(self) -> xr.Dataset:
        """What data and decay did up to every step, mean over classes."""
        return self.study.dataset("running_totals", lambda: measures.running_totals(self.by_class.dataset)).load()

    @cached_property
    def layer_influence(self) -> xr.DataArray:
        """By step and layer."""
        kept = self.study.dataset("layer_influence", lambda: layer_influence(self.by_class.dataset).to_dataset())
        return kept["influence"].load()

    @cached_property
    def layer_shares(self) -> xr.DataArray:
        """Parts of the layer influence, by step and layer."""
        return layer_shares(self.layer_influence)

    @cached_property
    def phase_kernels(self) -> xr.DataArray:
        """Between classes, in each phase."""
        spans = self.study.phases.spans
        kept = self.study.dataset(
            "phase_kernels", lambda: measures.phase_kernels(self.by_class.dataset, spans).to_dataset()
        )
        return kept["kernel"].load()

    @cached_property
    def certificate(self) -> pd.DataFrame:
        """What is explained of every step, and what is not."""
        return self.study.table(
            "certificate", lambda: measures.certificate_by_step(self.by_class.dataset).reset_index()
        ).set_index("step")

    @cached_property
    def kernel(self) -> xr.DataArray:
        """Between pairs, in short windows across the phases."""
        return kernels.kernel_in_windows(self.by_example.dataset, self.study.recipe, self.study.phases.spans)

    @cached_property
    def cancellation(self) -> pd.DataFrame:
        """How much of the single contributions remains in their sums, by query."""
        term = self.by_example.dataset.contribution
        over = {"examples": ["example"], "examples, windows and layers": ["example", "window", "layer"]}

        def compute() -> pd.DataFrame:
            rows = []
            for name, axes in over.items():
                ratio = cancellation_ratio(term, over=axes)
                rows.append({"over": name, "mean": float(ratio.mean()), "least": float(ratio.min())})
            return pd.DataFrame(rows)

        return self.study.table("cancellation", compute)

    @cached_property
    def balance(self) -> xr.DataArray:
        """Data against decay, by window and layer."""
        kept = self.study.dataset("balance", lambda: data_decay_balance(self.by_element.dataset).to_dataset())
        return kept["balance"].load()

    @cached_property
    def similarity(self) -> xr.DataArray:
        """Cosines of parameter scores, by layer, over the whole run."""
        term = self.by_element.dataset.contribution
        return self.study.dataset("similarity", lambda: similarity(term).to_dataset())["similarity"].load()

    @cached_property
    def similarity_in_windows(self) -> xr.DataArray:
        """The same in every window."""
        term = self.by_element.dataset.contribution
        kept = self.study.dataset("similarity_in_windows", lambda: window_similarity(term).to_dataset())
        return kept["similarity"]

    @cached_property
    def embedding(self) -> pd.DataFrame:
        """UMAP of the scores of linear2."""
        term, split = self.by_element.dataset.contribution, self.study.split
        return self.study.table("embedding", lambda: scores.embedded(term, split, layer="linear2"))

    @cached_property
    def importance(self) -> xr.DataArray:
        """Absolute importance of every parameter element, with its decay."""
        data = self.by_element.dataset
        kept = self.study.dataset("importance", lambda: absolute_importance(element_scores(data)).to_dataset())
        return kept["importance"].load()

    # ---------------------------------------------------------------- phases by a statistic

    @property
    def search(self) -> segments.Search:
        """How change points are looked for."""
        return segments.Search(num_draws=self.sizes.draws)

    @cached_property
    def change_point_number(self) -> pd.DataFrame:
        """How many change points the layer shares have."""
        return self.study.table(
            "change_point_number", lambda: segments.number_of_change_points(self.layer_shares, search=self.search)
        )

    @cached_property
    def change_points(self) -> pd.DataFrame:
        """Where they are, with intervals."""
        numbers = self.change_point_number
        number = int(numbers["number"][numbers["chosen"]].iloc[0])
        return self.study.table(
            "change_points", lambda: segments.change_points(self.layer_shares, number, search=self.search)
        )

    # ---------------------------------------------------------------- frequencies

    @cached_property
    def spectrum(self) -> pd.DataFrame:
        """Fourier frequencies of the trained network."""
        s = self.study

        def compute() -> pd.DataFrame:
            return frequencies.spectra_over_steps(s.recipe, s.run, [s.run.num_steps])

        return s.table("spectrum", compute)

    @cached_property
    def key_frequencies(self) -> list[int]:
        """Those that carry its logits."""
        return frequencies.key_frequencies(self.spectrum)

    @cached_property
    def linear2_similarity(self) -> xr.DataArray:
        """Similarities in linear2, labelled by answer."""
        return scores.by_answer(self.similarity.sel(layer="linear2"), self.study.recipe)

    @cached_property
    def frequency_fit(self) -> pd.DataFrame:
        """Lasso weights of the frequencies in the similarity."""
        return frequencies.fit_frequencies(self.linear2_similarity, self.study.recipe.task.cycle, equal_classes=False)

    @cached_property
    def progress(self) -> pd.DataFrame:
        """Nanda et al.'s progress measures."""
        s = self.study
        steps = spread(slice(0, s.run.num_steps + 1), self.sizes.checkpoints)
        return s.table("progress", lambda: progress_over_steps(s.recipe, s.run, s.split, self.key_frequencies, steps))

    # ---------------------------------------------------------------- interventions

    @cached_property
    def swaps(self) -> pd.DataFrame:
        """Final layers in earlier networks."""
        s = self.study
        return s.table("swaps", lambda: swap_curves(s.run, s.split, num_checkpoints=self.sizes.checkpoints))

    @cached_property
    def retrained_parts(self) -> list[pd.DataFrame]:
        """Every network that was given some layers and trained again."""
        s = self.study
        return [
            s.table(
                f"retrained/{condition.name.replace(' ', '_')}-{seed}",
                partial(retrain, s.recipe, s.run, condition, seed=seed, epochs=self.sizes.retrain_epochs),
            )
            for condition in conditions(s.curves, s.phases)
            for seed in range(self.sizes.retrain_seeds)
        ]

    @cached_property
    def retrained(self) -> pd.DataFrame:
        """All of them in one table."""
        return pd.concat(self.retrained_parts, ignore_index=True)

    @cached_property
    def pruned(self) -> pd.DataFrame:
        """Networks of which few weights are left."""
        s = self.study
        return s.table("pruned", lambda: prune_curves(s.run, s.split, self.importance))

    @cached_property
    def replayed(self) -> pd.DataFrame:
        """How far the last steps, made again with nothing removed, end from the recorded weights."""
        s, most = self.study, max(self.sizes.perturbed_steps)

        def compute() -> pd.DataFrame:
            difference = replay_difference(s.recipe, s.run, num_steps=most)
            return pd.DataFrame([{"num_steps": most, "difference": difference}])

        return s.table("perturbed/replayed", compute)

    @cached_property
    def perturbed(self) -> pd.DataFrame:
        """Scores against what is missing without their examples, or parameters."""
        s, query = self.study, scores.validation_pairs(self.study.recipe, num=self.sizes.perturbed_queries)
        examples = [
            s.table(
                f"perturbed/examples-{num_steps}",
                partial(
                    perturb_examples,
                    s.recipe,
                    s.run,
                    query,
                    num_chosen=self.sizes.perturbed,
                    num_steps=num_steps,
                    tolerance=self.sizes.tolerance,
                    progress=s.progress,
                ),
            )
            for num_steps in self.sizes.perturbed_steps
        ]
        chosen = self.by_element.dataset.isel(query=slice(0, self.sizes.perturbed_queries))
        elements = s.table(
            "perturbed/elements",
            lambda: perturb_elements(
                s.run, query, element_scores(chosen), num_chosen=self.sizes.perturbed, progress=s.progress
            ),
        )
        return pd.concat([*examples, elements], ignore_index=True)


def spread(span: slice, number: int) -> list[int]:
    """Evenly spaced steps of a span, the first and the last among them."""
    last = span.stop - 1
    count = min(number, span.stop - span.start)
    return sorted({round(span.start + (last - span.start) * place / max(count - 1, 1)) for place in range(count)})
