"""The engine for transformers models: a step loop whose rows join and leave between steps."""
