"""Jobs of Slurm: templates read and checked (batch), submitted (__main__), followed (watch)."""
