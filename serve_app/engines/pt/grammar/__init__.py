"""This package checks, compiles and follows output formats in processes that can be ended."""
