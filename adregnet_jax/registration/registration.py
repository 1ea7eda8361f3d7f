"""Results of a registration."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Registration(NamedTuple):
    """A registered batch on one grid.

    Attributes:
      displacement: [b, x, y, z, 3] in voxels: warped(p) = moving(p + u(p)).
      warped: [b, x, y, z, 1], the moving images pulled back to the fixed grid.
      pyramid: displacements of the network's levels, coarse to fine, each in voxels of its level.
      match_entropy: [b, x_l, y_l, z_l] in nats, of the network's levels, coarse to fine.
      inverse: [b, x, y, z, 3] in voxels, the inverse map; None unless the registration is diffeomorphic.
    """

    displacement: jax.Array
    warped: jax.Array
    pyramid: tuple[jax.Array, ...] = ()
    match_entropy: tuple[jax.Array, ...] = ()
    inverse: jax.Array | None = None
