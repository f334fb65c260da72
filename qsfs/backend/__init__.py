"""Backends: one interface, a 0-db client, a store in memory, and wrappers of the same interface."""
