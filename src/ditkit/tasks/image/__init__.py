"""Pictures: recipes of class-conditional models and of image codecs."""
