"""distcv: train image classifiers on one device or many, with one learning curve."""

__version__ = "0.1.0"
