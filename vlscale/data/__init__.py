"""Shards -> samples -> views -> `Batch`."""
