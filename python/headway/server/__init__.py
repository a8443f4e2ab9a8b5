"""The OpenAI-compatible server. Importing this package imports no web framework."""
