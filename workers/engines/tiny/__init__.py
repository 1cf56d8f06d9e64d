"""The built-in model ``tiny``: its weights (``model/``), the dialogues it learnt from, and how it was trained."""
