"""Label propagation of foreframe."""
