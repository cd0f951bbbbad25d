"""The one exception for what the person at the command line can put right."""


class UsageError(Exception):
    """Bad data or settings: the command line prints the message alone, and exits with code 2."""
