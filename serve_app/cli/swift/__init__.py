"""The command `serve-app from-swift`."""
