"""How a fleet comes by its secrets: authority, certificates, keys, and the rules of its broker."""
