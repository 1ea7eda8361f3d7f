"""The exception for mistakes that a user can fix: entry points print one line and exit with status 2."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """An input or setting that can't be used. The message is one line: expectation, value, advice."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def one_line(error: BaseException) -> str:
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split())


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")
