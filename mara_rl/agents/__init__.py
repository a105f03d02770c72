"""The agent: its network, its files, its names."""
