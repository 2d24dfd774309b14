"""The device's life, and what both ends share: adapters, wire, configuration, errors."""
