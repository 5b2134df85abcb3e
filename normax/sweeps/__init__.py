"""Many training runs as one compiled program."""
