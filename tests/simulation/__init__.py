"""The server under a seeded schedule of faults, in virtual time: ``python -m tests.simulation`` (see ``schedule``)."""
