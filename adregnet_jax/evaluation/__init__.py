"""Evaluation of trained networks: metrics of each case, tables, figures, statistics and ablations."""
