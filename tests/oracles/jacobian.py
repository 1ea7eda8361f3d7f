"""Derivatives and determinants, one voxel after the other."""

import itertools

import numpy as np


def derivative(array, position, axis):
    """d array / d axis at one voxel: central inside, one-sided on the border."""
    lower, upper = list(position), list(position)
    lower[axis] = max(position[axis] - 1, 0)
    upper[axis] = min(position[axis] + 1, array.shape[axis] - 1)
    return (array[tuple(upper)] - array[tuple(lower)]) / (upper[axis] - lower[axis])


def jacobian_determinant(displacement):
    """det(I + du/dp) of [x, y, z, 3]."""
    determinant = np.zeros(displacement.shape[:3])
    for position in itertools.product(*map(range, determinant.shape)):
        matrix = np.eye(3)
        for j in range(3):
            matrix[:, j] += derivative(displacement, position, j)
        determinant[position] = np.linalg.det(matrix)
    return determinant


def folded_volume(displacement):
    """Volume of the tetrahedra that [x, y, z, 3] turns inside out, both splits of each cube, by cube."""
    shape = displacement.shape[:3]
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(float)
    cubes = list(itertools.product(*(range(n - 1) for n in shape)))
    vertices = list(itertools.product((0, 1), repeat=3))
    total = 0.0
    for cube in cubes:
        for parity in (0, 1):
            middle = [v for v in vertices if sum(v) % 2 != parity]
            tetrahedra = [middle]
            for corner in vertices:
                if sum(corner) % 2 == parity:
                    near = [v for v in vertices if np.abs(np.subtract(v, corner)).sum() == 1]
                    tetrahedra.append([corner, *near])
            for tetrahedron in tetrahedra:
                places = [tuple(np.add(cube, v)) for v in tetrahedron]
                before = np.array([grid[p] for p in places])
                after = np.array([grid[p] + displacement[p] for p in places])
                # The sign of the volume before the map tells the orientation; both are volumes times 6.
                before, after = (np.linalg.det(points[1:] - points[0]) for points in (before, after))
                total += max(0.0, -after * np.sign(before)) / 6
    return total / 2 / len(cubes)
