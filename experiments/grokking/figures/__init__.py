"""The pictures of the study, one family per file; each takes computed data and returns a Figure."""

from .balance import balance
from .certificate import certificate
from .change_points import change_points
from .curves import training_curves
from .examples import top_examples
from .frequencies import frequency_fit, frequency_spectra, progress_curves
from .influence import layer_influence, model_influence
from .kernel import kernel_by_class, kernel_in_windows
from .nodes import closure_by_nodes
from .perturbations import perturbed_predictions
from .pruning import pruned_accuracy
from .retraining import retrained_accuracy
from .similarity import similarity, similarity_in_windows
from .swaps import swapped_accuracy
from .umap import embedding

__all__ = [
    "balance",
    "certificate",
    "change_points",
    "closure_by_nodes",
    "embedding",
    "frequency_fit",
    "frequency_spectra",
    "kernel_by_class",
    "kernel_in_windows",
    "layer_influence",
    "model_influence",
    "perturbed_predictions",
    "progress_curves",
    "pruned_accuracy",
    "retrained_accuracy",
    "similarity",
    "similarity_in_windows",
    "swapped_accuracy",
    "top_examples",
    "training_curves",
]
