"""The aligned-generation endpoint, put together: LLM, registry, scores, Ray Serve."""
