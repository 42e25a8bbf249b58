"""Comparisons of methods, and what is done with the models of a run that has ended."""
