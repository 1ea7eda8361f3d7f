"""The one exception for what a user can mend: entry points print it as a single line and exit with 2."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """Input or setting that can't be used. The message says what was expected, what came, what to do.

    It is one line, whatever it cites from a file.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def one_line(error: BaseException) -> str:
    """The message of an exception without its line breaks."""
    return " ".join(str(error).split())


class OneLineParser(argparse.ArgumentParser):
    """A command line whose mistakes are `UserError`s: one line, as of everything here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells of the options")
