"""Save and load coordinate weights."""
