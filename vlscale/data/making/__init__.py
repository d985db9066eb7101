"""Shards from other data: writing, checksums, resuming."""
