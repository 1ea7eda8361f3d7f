"""Reading, preprocessing and batching of image pairs; no JAX."""
