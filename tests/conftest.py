"""Settings of all tests, made before JAX is loaded."""

import os

# Tests compile many small programs and run each once: without LLVM's optimisations they take a third of the
# time. Flags that are already set are left alone, so that a run with optimisations is one variable away.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
