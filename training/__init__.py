"""Shards in, checkpoints and an export out."""
