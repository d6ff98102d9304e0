"""Flows of foreframe."""
