"""Which table of operations is fastest on which device."""
