"""The verbs of the package: generate, compare, tune."""
