"""Prompt queues in Redis."""
