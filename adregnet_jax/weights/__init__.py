"""Trained networks, their packed weights and the shipped set."""
