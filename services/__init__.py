"""Ray Serve, Redis and score-model services."""
