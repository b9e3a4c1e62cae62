"""Glue to other libraries: the only place that knows their classes."""
