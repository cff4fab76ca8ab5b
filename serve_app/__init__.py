"""serve-app serves many Hugging Face models by name behind one OpenAI-compatible address, on Ray Serve."""

__version__ = "0.1.0"
