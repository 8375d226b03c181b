"""Every loop, model and optimizer that is supported or refused, as data; `python -m tests.loops` measures them all."""
