"""Tensors that lie elsewhere: sharded over processes, or offloaded to where nothing computes."""
