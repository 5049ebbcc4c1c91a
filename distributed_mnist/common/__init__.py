"""Small modules that many folders use: keyed random numbers, digests, atomic file writes, placement.

Nothing here imports from another folder. A file belongs here only if several folders need it.
"""
