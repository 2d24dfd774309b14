"""How a device learns. With `export`, the only room that imports torch."""
