"""Pickles of torch, read without running code from the file: as data first, checked, and only then made.

:mod:`.inert` reads what the file describes, :mod:`.archives` holds its bytes, :mod:`.allowed` says which names it may
use, :mod:`.checks` asks whether the whole is data and layers, :mod:`.tensors` and :mod:`.objects` make it. Nothing of
the process is changed for the time of a load, so threads may load at once.
"""
