"""Summaries and statistics of decompositions: arrays in, arrays out."""
