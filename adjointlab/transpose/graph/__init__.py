"""The program as data: a graph of ATen operations, tables of operations, and how graphs are edited."""
