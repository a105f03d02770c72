"""The frozen policy LLM: loading, slots, attention, candidates."""
