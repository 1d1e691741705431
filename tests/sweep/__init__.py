"""The sweep over architectures: what a conversion promises, checked on one model after the other."""
