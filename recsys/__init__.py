"""Cross-domain sequential recommendation that can be believed: data, models, evaluation, geometry, scaling."""

__version__ = "0.1.0"
