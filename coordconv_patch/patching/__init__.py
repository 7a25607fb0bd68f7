"""The plan, and the plan carried out."""
