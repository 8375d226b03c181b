"""Recorded forward calls, made again: the model as a function of its parameters, and the gradients of a call."""
