"""The ways a run can end early; each carries the exit code its script returns."""

import errno


class RunError(Exception):
    """A run that cannot go on. The text is the one message shown to the user."""

    exit_code = 1


class ConfigError(RunError):
    """The configuration, an option or the run folder asked for cannot be used."""

    exit_code = 2


class DataError(RunError):
    """The data set is missing, damaged or cannot be made."""

    exit_code = 3


class CheckpointError(RunError):
    """There is no checkpoint that can be read."""

    exit_code = 4


class NonFiniteError(RunError):
    """The loss diverged: it or its gradient is no finite number, or above what was allowed."""

    exit_code = 5


class DiskFullError(RunError):
    """The disk (or the user's quota) is full."""

    exit_code = 6


class Interrupted(RunError):
    """Ctrl-C; what was trained has been saved."""

    exit_code = 130


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of causes."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error goes back to a full disk or an exhausted quota."""
    root = root_cause(error)
    if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Orbax's storage layer reports the system's error as text.
    return any(text in str(root) for text in ("No space left on device", "Disk quota exceeded"))
