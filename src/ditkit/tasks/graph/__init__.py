"""Graphs of events: later links, and the state of nodes."""
