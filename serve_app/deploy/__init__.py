"""Turns a config into an application of Serve: it decides where a model is placed and with which options."""
