"""Recipes of foreframe."""
