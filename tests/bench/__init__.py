"""Measurements against peers in the same run: ``python -m tests.bench``. Not tests: nothing here passes or fails."""
