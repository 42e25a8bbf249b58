"""Where a run folder lies, and what is kept there: file systems, object stores, checkpoints."""
