"""Where bytes lie: tars and their indexes, stores, the cache."""
