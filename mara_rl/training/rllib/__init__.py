"""PPO in RLlib: module, connectors, learner, rollout actors."""
