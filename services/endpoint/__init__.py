"""The aligned-generation endpoint: OpenAI's API over one LLM and its agents."""
