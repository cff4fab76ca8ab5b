"""Decisions about memory and placement: pure functions of values. No I/O, no logging, no torch, ray or vllm."""
