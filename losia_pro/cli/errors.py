"""The one exception that a user sees as a sentence."""


class CliError(Exception):
    """What went wrong and what would do; printed as one red line, exit code 2."""
