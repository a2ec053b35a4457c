"""What the tests share: servers, a Slurm cluster, processes, run folders, data files."""
