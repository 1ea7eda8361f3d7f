"""Training: state, step, sharding, checkpoints, and the loop that ties them together."""
