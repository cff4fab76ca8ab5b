"""Decides which of the models that share memory hold it at each moment, and keeps that within what there is."""
