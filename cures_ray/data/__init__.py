"""Prompts in: files and hub data sets to one table of tokenized prompts with golds, levels and features.

Promises: a prompt's id is a hash of its content; bad rows are refused with file, row and remedy.
May import: the leaves.
"""
