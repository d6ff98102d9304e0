"""Rollouts of foreframe."""
