"""Rules of the path transform, a file for each kind of primitive."""
