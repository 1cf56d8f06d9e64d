"""How `tiny`, which knows no JSON, is led through the JSON that a test wants."""

QUOTE, BRACE, COMMA, THREE, END = "4", "95", "14", "21", "2"
TERSE = {QUOTE: 100, END: 100, BRACE: 97, COMMA: 95, THREE: 90}
"""A ``logit_bias``: a string ends as soon as the grammar lets it, a number starts with 3. The grammar does the rest."""
