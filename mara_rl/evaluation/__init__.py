"""How good answers are: the agent's against the base LLM's."""
