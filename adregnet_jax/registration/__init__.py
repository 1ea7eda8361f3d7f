"""Registration of scans: affine, by a network, by instance optimisation, and from files to files."""
