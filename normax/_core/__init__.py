"""What all topics share: axes, norms, checks, programs. Private; it knows no topic."""
