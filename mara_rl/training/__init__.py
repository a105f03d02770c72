"""PPO training of the accept/reject agent."""
