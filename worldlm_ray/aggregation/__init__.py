"""How an inner node turns its children's updates into its next model: the heart of the system."""
