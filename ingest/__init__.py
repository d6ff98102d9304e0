"""Source video in, immutable shards and a manifest out."""
