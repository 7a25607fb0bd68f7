"""The README and the pages of docs/: their code runs, and what they say is what records say."""
