"""Template banks made from tasks, adapters and data."""
