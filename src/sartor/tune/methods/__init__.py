"""Tuning methods: each file has the options of one, how it is put on a base, and the bytes that it stores."""
