"""Programs, one for each experiment: thin, and free to import everything."""
