"""Jobs on Slurm and on lists of hosts."""
