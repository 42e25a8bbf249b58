"""Configuration: every setting and its default, how it is read, and where an error lies."""
