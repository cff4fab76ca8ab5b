"""This package has import paths that config files of earlier versions name."""
