"""Which weights are scale-invariant, and what follows for weight decay."""
