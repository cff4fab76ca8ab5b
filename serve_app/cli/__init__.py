"""This package is the command line `serve-app …`."""
