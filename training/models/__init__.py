"""Models of foreframe."""
