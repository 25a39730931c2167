"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in the input; its message says what, what came and what to do.

    The command line prints the message alone, without a traceback, and exits with 1.
    """
