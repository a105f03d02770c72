"""The accept/reject task as Gymnasium environments; importing this registers them."""

import gymnasium as gym

ENV_ID = "MARA/TokenAcceptReject-v0"


def register() -> None:
    """Register `ENV_ID`; a second call does nothing."""
    if ENV_ID not in gym.registry:
        gym.register(
            ENV_ID,
            entry_point="envs.token_env:TokenAcceptRejectEnv",
            vector_entry_point="envs.vector_env:TokenAcceptRejectVectorEnv",
        )


register()
