"""Grokking of modular arithmetic: the task, the model and the recipes of the study.

The experiment depends on :mod:`explaind`, never the reverse.
"""
