"""This package is the command `serve-app from-swift`."""
