"""The formats of a report: each renders the same model."""
