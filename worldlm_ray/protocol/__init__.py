"""What a child says to its parent and when, as steps for a thread, an event loop or a virtual clock to take."""
