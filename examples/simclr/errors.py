"""What the command line prints as one line, without a traceback; `code` is its exit code."""


class UsageError(Exception):
    """Bad data or settings, which the person at the command line can put right."""

    code = 2


class RunError(Exception):
    """Training cannot go on."""

    code = 1
