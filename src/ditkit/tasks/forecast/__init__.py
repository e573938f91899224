"""Forecasts: recipes, scores and figures."""
