"""Damaged and hostile files of every format, and what is to become of them."""
