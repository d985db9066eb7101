"""One file per evaluation task."""
