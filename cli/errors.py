"""What the command line tells a person in one line before it exits with 1."""


class CliError(Exception):
    """The message is the whole story: what is wrong and, where it can be said, how to mend it."""
