"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """A wrong file, key or value. The message is one line: what is wrong, what was expected, how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """
