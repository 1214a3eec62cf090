"""From a Python function to graphs: what it depends on, its forward, and the vector-Jacobian product of that."""
