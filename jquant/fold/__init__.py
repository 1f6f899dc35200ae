"""Exact rewrites of parameters, found in the jaxpr: scales and rotations that the function does not notice."""
