"""The tensor mathematics of RECAST: composing weights, their gradients, a task for each sample, fingerprints."""
