"""The error of a run that has to go back to its newest checkpoint."""

from mara_rl.errors import RetryableError


class LostPart(RetryableError):
    """A part that cannot be replaced on its own is gone: the learner, or the prompt queue.

    `mara_rl.training.train` goes on from the newest checkpoint when it meets this.
    """
