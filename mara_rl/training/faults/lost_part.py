"""The error of a run that has to go back to its newest checkpoint."""

import contextlib
from collections.abc import Iterator

from ray.exceptions import RayError

from mara_rl.common.errors import RetryableError
from mara_rl.training.faults.runner_errors import cause


class LostPart(RetryableError):
    """A part that cannot be replaced on its own is gone: the learner, or the prompt queue.

    `mara_rl.training.training_run` goes on from the newest checkpoint when it meets this.
    """


@contextlib.contextmanager
def lost_on_ray_errors(loss: str) -> Iterator[None]:
    """Raise LostPart, ``loss`` and its cause on one line, where Ray tells of an actor's failure."""
    try:
        yield
    except RayError as error:
        raise LostPart(f"{loss}: {cause(str(error))}") from error
