"""A task of a model: how it is made, what its file holds, and arithmetic on tasks."""
