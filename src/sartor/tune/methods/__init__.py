"""Tuning methods: each file has the options of one, how it is applied, and the bytes it stores."""
