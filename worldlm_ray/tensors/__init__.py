"""Parameters as one flat buffer, and the layout that says what lies where."""
