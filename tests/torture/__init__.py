"""The program on its worst day: `python -m tests.torture`."""
