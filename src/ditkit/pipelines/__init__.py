"""Acceleration of diffusers pipelines: the call, the scheduler's clock, replay and adapters."""
