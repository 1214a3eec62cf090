"""Adapters that convert operators to and from other libraries; import each by name, its library is required.

``adjointlab.adapters.scipy``, ``adjointlab.adapters.pylops``, ``adjointlab.adapters.deepinv``,
``adjointlab.adapters.mrpro``.
"""
