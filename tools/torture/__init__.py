"""The program on its worst day: `python -m tools.torture`."""
