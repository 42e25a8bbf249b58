"""The Python interface: train, simulate, compare, load. The command line calls the same functions."""
