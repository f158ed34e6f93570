"""Measuring: the evaluation and its deltas, what SLIM is compared with, plots, costs and checks."""
