"""Saving, loading and sharing tasks: the Hub, model cards, and how a backbone is found again."""
