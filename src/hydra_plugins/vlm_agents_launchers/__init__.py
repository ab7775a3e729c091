"""Jobs of a sweep side by side, as Slurm jobs or as processes of this machine. Hydra looks for launchers here."""
