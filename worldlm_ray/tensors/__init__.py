"""Parameters as one flat buffer, and the layout that says where each of them lies."""
