"""The options that a config is made of, and how they are checked."""
