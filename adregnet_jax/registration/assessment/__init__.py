"""How far a registration can be trusted: evidence from the scans and the field alone, and a verdict."""
