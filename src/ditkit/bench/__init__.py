"""Measurements: paired losses, and the claims of papers tried with them."""
