"""The errors a user can meet. Each message is one line: the field, its value, what was expected."""


class MaraError(Exception):
    """Anything that ends a command with exit status 1 and a one-line reason."""


class ConfigError(MaraError):
    """A setting, argument or plan that cannot work, named with its value."""


class DataError(MaraError):
    """A file, prompt, checkpoint or score that is not what it should be; retrying cannot help."""


class RetryableError(MaraError):
    """A service was away or too slow; the same call may succeed later."""
