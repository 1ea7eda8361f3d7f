"""Implementations that exist only for XLA's CPU backend."""
