"""The ``mara-rl`` command line; one module per group of commands."""
