"""Measurements of a registered pair as table rows, figures and HTML pages."""
