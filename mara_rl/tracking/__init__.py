"""MLflow runs and the agent registry."""
