"""Jobs of a Slurm cluster, through submitit."""
