"""XLA flags with which the tests compile quickly."""

from importlib.metadata import version

# Tests compile many small programs and run each once: without LLVM's optimisations they take two thirds of
# the time, and half of that without the fusion emitters, which jaxlib 0.11 made the only way.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
