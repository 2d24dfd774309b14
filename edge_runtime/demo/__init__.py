"""Everything on one machine: broker, server and unlike devices, watched and reported."""
