"""What `shards.py verify` and `describe` show."""
