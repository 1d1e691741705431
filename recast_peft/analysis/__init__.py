"""What is measured of a model and its tasks: fidelity, sizes, sequences, pictures."""
