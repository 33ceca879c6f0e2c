"""llmctl: raw text to a served language model, one command line, chained by artifacts on disk."""

__version__ = "0.1.0"
