"""What a CUDA machine can tell in a quarter of an hour: python -m benchmarks gpu [--dry-run].

Every step runs in its own process with its own time limit, and writes each row as soon as it is measured. A step
that fails or is cut off loses no other step's rows, and not its own earlier ones. docs/gpu.md says what was seen.
"""

from benchmarks.gpu.runner import main

__all__ = ["main"]
