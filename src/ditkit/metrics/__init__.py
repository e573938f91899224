"""Metrics of pictures, clips, distributions and forecasts, and the baselines beside them."""
