"""The public place to load score models from."""

from mara_rl.score_models.base import ScoreModel
from mara_rl.score_models.loading import load_score_model, shipped_names

__all__ = ["ScoreModel", "load_score_model", "shipped_names"]
