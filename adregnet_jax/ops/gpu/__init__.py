"""Implementations for accelerators, laid out for what XLA fuses on an NVIDIA GPU."""
