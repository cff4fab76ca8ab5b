"""The command line: `serve-app …`."""
