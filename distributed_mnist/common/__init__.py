"""Small things that every other folder uses: keyed random numbers, digests, atomic files, and the like.

Nothing here imports from another folder. A file belongs here only if several folders need it.
"""
