"""Output for people: tables, progress, the description of a configuration, the outcome of a run."""
