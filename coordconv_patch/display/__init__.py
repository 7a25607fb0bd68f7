"""How results are shown: one description, as text, in colour, in a notebook, as an HTML page."""
