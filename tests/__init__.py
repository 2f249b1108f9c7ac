"""The tests, and how long they wait."""

from typing import Final

HANG: Final = 60.0
"""Seconds after which a test that hangs is given up. A guard, and no bound: nothing has to be done by then."""
