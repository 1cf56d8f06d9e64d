"""Engines whose model is another server, asked over its own API."""
