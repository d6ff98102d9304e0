"""Report of foreframe."""
