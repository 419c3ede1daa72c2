"""Mask refiners."""
