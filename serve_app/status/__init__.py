"""Says what a cluster runs, for the command line and for the console."""
