"""Has the autoscaling policy under its old name. It has moved to `serve_app.replica.autoscaling`."""

from serve_app.replica.autoscaling import by_engine_load

__all__ = ["by_engine_load"]
