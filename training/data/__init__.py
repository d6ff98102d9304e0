"""Data of foreframe."""
