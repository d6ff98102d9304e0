"""Simulators of foreframe."""
