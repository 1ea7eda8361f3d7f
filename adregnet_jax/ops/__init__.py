"""Pure functions on arrays: they jit, vmap and differentiate. The law they obey is in `ops.grid`."""
