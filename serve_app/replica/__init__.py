"""The deployment of one model: its plan on the devices that it sees, its start, its report."""
