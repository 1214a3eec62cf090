"""Adapters to other libraries, both ways; each is imported by name and needs its library.

``adjointlab.adapters.scipy``, ``adjointlab.adapters.pylops``, ``adjointlab.adapters.deepinv``.
"""
