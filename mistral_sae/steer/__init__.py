"""The model with its features edited, and what that does to its text."""
