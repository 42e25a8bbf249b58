"""What travels between a child and its parent, how it is encoded, and what is believed of it."""
