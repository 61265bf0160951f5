"""Data: token corpora on disk and the generators of the nano families."""
