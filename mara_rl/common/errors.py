"""The errors a user can meet. Each message is one line: the field, its value, what was expected."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

_Model = TypeVar("_Model", bound=BaseModel)


class MaraError(Exception):
    """Anything that ends a command with exit status 1 and a one-line reason."""


class ConfigError(MaraError):
    """A setting, argument or plan that cannot work, named with its value."""


class DataError(MaraError):
    """A file, prompt, checkpoint or score that is not what it should be; retrying cannot help."""


class RetryableError(MaraError):
    """A service was away or too slow; the same call may succeed later."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_problem(error: ValidationError, prefix: str = "") -> str:
    """The first thing pydantic found wrong, on one line; ``prefix`` goes before its path."""
    first = error.errors()[0]
    key = ".".join([*filter(None, [prefix]), *(str(part) for part in first["loc"])])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if not key:
        return message
    if first["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {message[0].lower()}{message[1:]}, not {first['input']!r}"


def validated(
    model: type[_Model],
    values: object,
    where: str = "",
    *,
    prefix: str = "",
    error: type[MaraError] = ConfigError,
) -> _Model:
    """``values`` as a ``model``. Raises ``error``, one line: ``where``, and the `first_problem`."""
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        problem = first_problem(invalid, prefix)
        raise error(f"{where}: {problem}" if where else problem) from invalid
