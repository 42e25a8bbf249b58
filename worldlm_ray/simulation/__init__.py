"""A run under a virtual clock, in one process."""
