"""READS what models write between the lines: thoughts and calls of tools, out of pieces of text.

State machines without clocks, models or HTTP. A parser is fed text as it comes, cut anywhere, and
gives back what it is sure of; the same text gives the same outcome however it was cut.
"""
