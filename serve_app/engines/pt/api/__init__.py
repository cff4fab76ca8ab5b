"""pt's OpenAI API: requests are checked, become sequences, and their outputs become answers."""
