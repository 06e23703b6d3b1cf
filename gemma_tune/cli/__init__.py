"""The command line: one small module for each verb, which turns flags into a Config, makes one library call, and prints
what came of it.
"""
