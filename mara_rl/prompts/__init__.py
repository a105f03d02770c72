"""Prompts the project ships."""
