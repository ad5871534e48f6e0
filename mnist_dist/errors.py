"""The two kinds of failure that end a run with one message instead of a traceback."""


class UserError(ValueError):
    """A mistake that its user can correct: an option, a file, a world. The message names the thing, its value and what is allowed."""

    exit_code = 2


class RunError(RuntimeError):
    """A failure while running that is nobody's typing mistake: a NaN, a full disk, a lost rank."""

    exit_code = 1
