"""Frozen models that score (prompt, response) pairs."""
