"""What attribution costs, measured against the training step of the same model: `python -m tests.benchmarks`."""
