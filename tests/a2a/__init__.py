"""Tests of what A2A is, without I/O."""
