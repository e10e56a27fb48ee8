"""Validation: influence estimates against what they approximate, measured."""
