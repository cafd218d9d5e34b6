"""Files on disk: reading by one descriptor, writing that is whole or absent, checksums, interrupts."""
