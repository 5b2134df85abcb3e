"""Path geometry of ReLU networks: path norms, path scales and Path-SGD."""
