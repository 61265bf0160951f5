"""Pretraining of the nano models that ship with the package."""
