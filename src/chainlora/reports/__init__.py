"""Pages to show: HTML files that need nothing but themselves."""
