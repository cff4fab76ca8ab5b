"""Holds the deployment of one model: its plan on the devices that it sees, its start, and its report."""
