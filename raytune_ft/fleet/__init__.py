"""Fleets: many jobs, each lane with one resident base."""
