"""Signals as latents and back, one file each."""

from ditkit.codecs.image_vae import ImageVae, ImageVaeConfig
from ditkit.codecs.representation import RepresentationCodec, RepresentationConfig

__all__ = ["ImageVae", "ImageVaeConfig", "RepresentationCodec", "RepresentationConfig"]
