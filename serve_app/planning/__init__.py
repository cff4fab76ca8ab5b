"""Decides about memory and placement by pure functions of values, without I/O, a clock, logging, torch, ray or vllm."""
