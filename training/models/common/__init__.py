"""Common of foreframe."""
