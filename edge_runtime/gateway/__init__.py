"""An edge gateway: the server of its own devices, and one device of the fleet above."""
