"""Import paths that config files of earlier versions name."""
