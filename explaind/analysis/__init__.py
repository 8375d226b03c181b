"""Summaries of results: arrays in, arrays out, no autograd and no figures."""
