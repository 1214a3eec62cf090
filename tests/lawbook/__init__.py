"""The laws, by chapters; `test_laws.py` runs them."""
