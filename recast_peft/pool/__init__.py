"""Thousands of tasks beside one model."""
