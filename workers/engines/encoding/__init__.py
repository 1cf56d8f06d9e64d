"""Engines that read and do not write: embeddings and rankings."""
