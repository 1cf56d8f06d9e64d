"""Fault tests: README.md has the table row -> test."""
