"""Launch scripts in the shape of XManager: an experiment, its executables, a job for each point."""
