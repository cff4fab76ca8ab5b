"""This package is pt's OpenAI API: requests are checked and become sequences, and their outputs become answers."""
