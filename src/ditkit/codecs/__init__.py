"""Signals as latents and back, one file each."""

from ditkit.codecs.image_vae import ImageVae, ImageVaeConfig

__all__ = ["ImageVae", "ImageVaeConfig"]
