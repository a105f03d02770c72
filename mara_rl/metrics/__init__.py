"""Preference rates, bootstrap intervals, text quality."""
