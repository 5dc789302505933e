"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Something in the input that cannot be used; the message says what, and what to do.

    The command line shows the message alone, with exit code 2; any other exception is a bug and keeps its traceback.
    """
