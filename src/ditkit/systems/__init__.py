"""The published systems that ditkit hosts: one row a file, the claims tried on each, and the check of both."""
