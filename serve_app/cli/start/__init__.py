"""The commands `serve-app run` and `serve-app demo`."""
