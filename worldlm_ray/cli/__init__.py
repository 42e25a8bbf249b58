"""The `worldlm` command."""
