"""What a person reads: tables, progress, what a configuration means, what a run came to."""
