"""Score services: Ray Serve deployments and their clients."""
