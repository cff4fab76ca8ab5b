"""This package has the commands `serve-app run` and `serve-app demo`."""
