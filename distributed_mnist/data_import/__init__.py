"""`dmnist data import`: turn data sets in other formats into IDX files.

Input: a file or a folder in one of the formats that `data/recognise` knows. Output: four IDX
files, checked. Start with `command`. There is one reader for each format; `formats` lists them.
"""
