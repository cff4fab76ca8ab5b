"""From a config to an application of Serve: where a model is placed, and with which options."""
