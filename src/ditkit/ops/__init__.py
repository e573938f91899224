"""Operations, a folder each: the plain reference, and the fast ones."""
