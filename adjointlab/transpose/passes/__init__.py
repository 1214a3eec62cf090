"""Rewritings of graphs: each takes a graph that runs and returns an equal one."""
