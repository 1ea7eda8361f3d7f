"""The one exception for what a user can mend: entry points print it as a single line and exit with 2."""


class UserError(Exception):
    """Input or setting that can't be used. The message says what was expected, what came, what to do."""
