"""Knows adapters by name: which of them a file names, and which of them the replicas of a cluster have."""
