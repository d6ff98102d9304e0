"""Corpora of foreframe."""
