"""Callbacks of foreframe."""
