"""Clips: recipes, masks, scores and figures."""
