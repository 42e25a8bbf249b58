"""The same exchange by the frameworks that a user would pick instead; run in their own virtual environments."""
