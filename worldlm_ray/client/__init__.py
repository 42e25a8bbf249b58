"""A leaf of the tree: the client, and many clients in one process."""
