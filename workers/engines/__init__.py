"""Engines: what turns a claimed job into tokens. Only this folder may import torch, and only in the chosen engine."""
