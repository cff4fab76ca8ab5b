"""The command `serve-app plan`."""
