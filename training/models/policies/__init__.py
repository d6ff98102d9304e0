"""Policies of foreframe."""
