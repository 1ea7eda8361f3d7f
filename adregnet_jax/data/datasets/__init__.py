"""Data sets: the pairs of each, split into training, validation and test."""
