"""Has the exit codes that more than one command returns."""

# The exit code that a shell reports of a program that SIGINT has ended.
INTERRUPTED = 130
# The exit code that a shell reports of a program that SIGPIPE has ended, as `head` ends one that goes on writing.
READER_GONE = 141
