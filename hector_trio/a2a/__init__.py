"""A2A (Agent2Agent protocol 1.0): its types, its errors, and how a task's log becomes its objects. Pure; no I/O."""
