"""Reports, sheets, strips, films and plots."""
