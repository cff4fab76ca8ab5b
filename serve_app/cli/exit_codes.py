"""Has the exit codes that more than one command returns."""

# The exit code that a shell reports of a program that SIGINT has ended.
INTERRUPTED = 130
