"""Storage of a run folder: file systems, object stores, checkpoints."""
