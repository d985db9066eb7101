"""One file per published system; the folder is the registry (`config.pick("families", name)`)."""
