"""Named sets, one module each: `load(size: int | None, ...) -> ImageSet`."""
