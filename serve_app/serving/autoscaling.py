"""The name that config files gave the autoscaling policy before it moved to `serve_app.replica.autoscaling`."""

from serve_app.replica.autoscaling import by_engine_load

__all__ = ["by_engine_load"]
