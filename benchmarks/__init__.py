"""Benchmarks: `python -m benchmarks` runs all, `python -m benchmarks NAME` one. See benchmarks/README.md."""
