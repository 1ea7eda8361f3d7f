"""The command line of the package, `adregnet`.

Modules with commands import everything that loads NumPy or JAX inside their functions, so that `--help` is
immediate.
"""
