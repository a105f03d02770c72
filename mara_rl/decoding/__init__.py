"""Aligned decoding: answers by an LLM, alone or steered by agents, many at once."""
