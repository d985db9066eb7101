"""One file per training objective; the folder is the registry (`config.pick("objectives", name)`)."""
