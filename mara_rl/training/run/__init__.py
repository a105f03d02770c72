"""A run's folder, names, services, checkpoints, status."""
