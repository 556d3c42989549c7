"""The built-in demo model: its corpus of small checkable facts, its training and its evaluation.
A tool for making the model; nothing in the package imports it, and it needs torch and transformers."""
